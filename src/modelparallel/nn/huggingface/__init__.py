"""Models of transformers that are split out of the box, and the translators of their state dicts (smp-api section 10).

`prepare_families` is called when a model is wrapped. Nothing here imports transformers before the user has: a family
counts only where its classes have been imported, since there can be no instance before.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packaging.version import Version
from torch import nn

from modelparallel.job import registry
from modelparallel.job.registry import ConstructorArguments, Family, Registration
from modelparallel.nn.huggingface import answers, bert, gpt2, gptj, gptneo, gptneox, options, roberta, translation
from modelparallel.nn.huggingface.translation import NameLayout, Place, StateDict, Translate
from modelparallel.nn.lm_head import DistributedTransformerLMHead
from modelparallel.nn.transformer import DistributedTransformer

_TOO_NEW = Version("6.dev0")


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model (``has_head``), or its body, that a DistributedTransformerLMHead replaces."""

    layout: NameLayout
    init_hook: options.InitHook
    has_head: bool
    result: str
    documented: tuple[Translate, Translate]

    def arguments_of(self, module: nn.Module) -> ConstructorArguments:
        """See `registry.Family`."""
        self.init_hook(module.config)  # what is wrong with an option is said before what comes of it
        return options.arguments_of(module, Place(self.layout, has_head=self.has_head))

    def answer_of(self, module: nn.Module) -> answers.LanguageModelAnswer:
        """See `registry.Family`."""
        config: Any = module.config
        return answers.LanguageModelAnswer(
            answers.Signature.of(type(module)),
            config,
            self.has_head,
            bool(getattr(config, "add_cross_attention", False)) and self.layout is gpt2.LAYOUT,
            self.result,
        )

    def translations_at(self, prefix: str) -> tuple[Translate, Translate]:
        """See `registry.Family`; the documented functions for the whole model."""
        return self.documented if self.has_head and not prefix else _pair(Place(self.layout, prefix, self.has_head))

    def new_names_at(self, prefix: str, names: Collection[str]) -> dict[str, str]:
        """See `registry.Family`."""
        return translation.new_names(names, Place(self.layout, prefix, self.has_head))

    def kept_arguments(self, module: nn.Module) -> dict[str, Any]:
        """See `registry.Family`."""
        place = Place(self.layout, has_head=self.has_head)
        return {"tie_word_embeddings": options.is_head_tied(module, place)} if self.has_head else {}


@dataclass(frozen=True)
class Encoder:
    """An encoder that a DistributedTransformer replaces."""

    layout: NameLayout
    init_hook: options.InitHook = bert.encoder_arguments
    result: str = "BaseModelOutputWithPastAndCrossAttentions"

    def arguments_of(self, module: nn.Module) -> ConstructorArguments:
        """See `registry.Family`."""
        self.init_hook(module.config)
        return options.arguments_of(module, Place(self.layout))

    def answer_of(self, module: nn.Module) -> answers.EncoderAnswer:
        """See `registry.Family`."""
        config: Any = module.config
        has_cross_attention = bool(config.is_decoder and config.add_cross_attention)
        return answers.EncoderAnswer(answers.Signature.of(type(module)), config, has_cross_attention, self.result)

    def translations_at(self, prefix: str) -> tuple[Translate, Translate]:
        """See `registry.Family`."""
        return _pair(Place(self.layout, prefix))

    def new_names_at(self, prefix: str, names: Collection[str]) -> dict[str, str]:
        """See `registry.Family`."""
        return translation.new_names(names, Place(self.layout, prefix))

    def kept_arguments(self, module: nn.Module) -> dict[str, Any]:
        """See `registry.Family`."""
        return {}


def _pair(place: Place) -> tuple[Translate, Translate]:
    return functools.partial(_to_hf_at, place), functools.partial(_to_smp_at, place)


def _to_hf_at(place: Place, state_dict: Mapping[str, Any], max_seq_len: int | None = None) -> StateDict:
    return translation.to_hf(state_dict, [place], max_seq_len)


def _to_smp_at(place: Place, state_dict: Mapping[str, Any], max_seq_len: int | None = None) -> StateDict:
    return translation.to_smp(state_dict, [place])


def _language_models(module: Any, names: tuple[str, str], results: tuple[str, str], documented: Any) -> Any:
    of_body = functools.partial(options.body_arguments, module.model_arguments)
    return (
        (names[0], LanguageModel(module.LAYOUT, module.model_arguments, True, results[0], documented)),
        (names[1], LanguageModel(module.LAYOUT, of_body, False, results[1], documented)),
    )


# Below transformers.models: (module, [(class, what replaces it)]).
_FAMILIES: tuple[tuple[str, tuple[tuple[str, LanguageModel | Encoder], ...]], ...] = (
    (
        "gpt2.modeling_gpt2",
        _language_models(
            gpt2,
            ("GPT2LMHeadModel", "GPT2Model"),
            ("CausalLMOutputWithCrossAttentions", "BaseModelOutputWithPastAndCrossAttentions"),
            (gpt2.translate_state_dict_to_hf_gpt2, gpt2.translate_hf_state_dict_to_smdistributed_gpt2),
        ),
    ),
    (
        "gptj.modeling_gptj",
        _language_models(
            gptj,
            ("GPTJForCausalLM", "GPTJModel"),
            ("CausalLMOutputWithPast", "BaseModelOutputWithPast"),
            (gptj.translate_state_dict_to_hf_gptj, gptj.translate_hf_gptj_state_dict_to_smdistributed_gptj),
        ),
    ),
    (
        "gpt_neo.modeling_gpt_neo",
        _language_models(
            gptneo,
            ("GPTNeoForCausalLM", "GPTNeoModel"),
            ("CausalLMOutputWithPast", "BaseModelOutputWithPast"),
            (gptneo.translate_state_dict_to_hf_gptneo, gptneo.translate_hf_state_dict_to_smdistributed_gptneo),
        ),
    ),
    (
        "gpt_neox.modeling_gpt_neox",
        _language_models(
            gptneox,
            ("GPTNeoXForCausalLM", "GPTNeoXModel"),
            ("CausalLMOutputWithPast", "BaseModelOutputWithPast"),
            (gptneox.translate_state_dict_to_hf_gptneox, gptneox.translate_hf_state_dict_to_smdistributed_gptneox),
        ),
    ),
    ("bert.modeling_bert", (("BertEncoder", Encoder(bert.LAYOUT)),)),
    ("roberta.modeling_roberta", (("RobertaEncoder", Encoder(roberta.LAYOUT)),)),
)


_BY_CLASS: dict[str, LanguageModel | Encoder] = {name: known for _, classes in _FAMILIES for name, known in classes}


def register_families() -> None:
    """Register the classes of transformers that the user has imported, except those that the user has registered.

    With a version of transformers that is not supported, warns and registers nothing.
    """
    imported = [
        (getattr(module, class_name), family)
        for path, classes in _FAMILIES
        if (module := sys.modules.get(f"transformers.models.{path}")) is not None
        for class_name, family in classes
    ]
    new = [(module_class, family) for module_class, family in imported if not registry.is_registered(module_class)]
    if not new:
        return
    version = translation.transformers_version()
    if not translation.OLDEST_VERSION <= version < _TOO_NEW:
        warnings.warn(
            f"transformers {version} is not supported by tensor parallelism (4.57 to 5.x are): models of transformers "
            "are not replaced; register classes with smp.tp_register_with_module",
            stacklevel=5,
        )
        return
    for module_class, family in new:
        registry.register(
            Registration(
                module_class,
                DistributedTransformer if isinstance(family, Encoder) else DistributedTransformerLMHead,
                init_hook=family.init_hook,
                family=Family(
                    family.arguments_of,
                    family.answer_of,
                    family.translations_at,
                    family.new_names_at,
                    options.origin_of,
                    family.kept_arguments,
                    ("config", "generation_config"),
                ),
            )
        )


def prepare_families(model: nn.Module, *, keeps_weights: bool) -> None:
    """Before modules of ``model`` are replaced: `register_families`; and where the script has skipped transformers'
    initialisation, tie what is around replaced modules as their configurations say.

    Weights around them are tied only where they do not count, since the weights of the replaced modules are new.
    """
    register_families()
    if keeps_weights:
        return
    for module in model.modules():
        inner: Any = module
        is_tied = bool(getattr(getattr(module, "config", None), "tie_word_embeddings", False))
        if not is_tied or not hasattr(module, "tie_weights") or not options.skips_initialization(module):
            continue
        if not _is_replaced(module) and any(_is_replaced(part) for part in module.modules()):
            inner.tie_weights()


def _is_replaced(module: nn.Module) -> bool:
    mark, registration = registry.tensor_parallel_mark(module), registry.registration_for(module)
    return mark is not None and mark.enabled and registration is not None and registration.family is not None


def translations_of(model: nn.Module) -> list[tuple[Translate, Translate]]:
    """The pairs (smp to transformers, transformers to smp) of the families that were replaced in ``model``."""
    return [
        family.translations_at(f"{name}." if name else "")
        for name, module in model.named_modules()
        if (family := registry.family_of(module)) is not None
    ]


def families_of(model: nn.Module) -> list[tuple[str, str]]:
    """Where families were replaced in ``model``, as data: (beginning of the module's names, class of transformers).
    What `translations_named` makes the pairs of `translations_of` from, without the model.
    """
    return [
        (f"{name}." if name else "", class_name)
        for name, module in model.named_modules()
        for class_name, known in _BY_CLASS.items()
        if (family := registry.family_of(module)) is not None and family.translations_at == known.translations_at
    ]


def translations_named(families: Sequence[tuple[str, str]]) -> list[tuple[Translate, Translate]]:
    """The pairs for what `families_of` has given. Raises KeyError for a class that this version does not know."""
    return [_BY_CLASS[class_name].translations_at(prefix) for prefix, class_name in families]


def new_names_of(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """What the parameters of the model as it was built, by name, have become where families were replaced in it."""
    new_names: dict[str, str] = {}
    for name, module in model.named_modules():
        family = registry.family_of(module)
        if family is not None:
            new_names.update(family.new_names_at(f"{name}." if name else "", names))
    return new_names
