"""Full checkpoints: the whole model in one file, which plain torch and transformers read (smp-api section 14).

    <path>/<tag>                  the merged state dict
    <path>/user_content_<tag>     what the script keeps beside it
    <path>/optimizer_<tag>        only with ``full_optimizer=True``, ours and not the original's
    <path>/complete_<tag>.json    sizes and digests of these files (completion.py)
    <path>/newest                 the tag; written last

Also a state dict that plain torch or transformers has written is read, which has no record (weights.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelparallel.checkpoints.huggingface.weights import find_weights, read_weights
from modelparallel.checkpoints.partial.agreement import agreed
from modelparallel.checkpoints.partial.torch_files import write_torch_file
from modelparallel.checkpoints.partial.user_content import (
    Allowed,
    named_types,
    read_restricted,
    read_user_content,
    saved_bytes,
)
from modelparallel.checkpoints.stores.completion import (
    Draft,
    file_of,
    is_unfinished,
    problems_of,
    read_record,
    write_newest,
)
from modelparallel.checkpoints.stores.completion_record import CompletionRecord
from modelparallel.checkpoints.stores.file_streams import FileRecord, shown
from modelparallel.checkpoints.stores.local import Store
from modelparallel.checkpoints.stores.opening import open_store
from modelparallel.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from modelparallel.job.messages import rank, size
from modelparallel.model import states as model_states
from modelparallel.nn.huggingface import translations_of
from modelparallel.parameters.table import PARTIAL_KEY
from modelparallel.training import runtime as runtime_module

if TYPE_CHECKING:
    from modelparallel.model.wrapper import DistributedModel
    from modelparallel.optimizer.wrapper import DistributedOptimizer

Translate = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def save_full(
    path: str | os.PathLike[str],
    tag: str,
    *,
    model: DistributedModel | None = None,
    optimizer: DistributedOptimizer | None = None,
    user_content: Any = None,
    translate_if_full: bool = True,
) -> None:
    """Write a full checkpoint; rank 0 writes. Collective over the world.

    Args:
        path, tag: the folder, which is made if need be, or a URL of fsspec; and the name of the file in it.
        model: its whole state; with families of transformers in it, under the names of transformers
            (``translate_if_full``).
        optimizer: its whole state.
        user_content: what `read_user_content` may read; None: no file.

    Raises CheckpointError on all ranks when a file cannot be written; what was there before is untouched then. Source:
    smp-api section 14.
    """
    check_tag(tag)
    state = None if model is None else model.state_dict(gather_to_rank0=True)
    optimizer_state = None if optimizer is None else optimizer.state_dict()
    with agreed():
        if rank() == 0:
            if model is not None and state is not None and translate_if_full:
                for to_transformers, _ in translations_of(model.module):
                    state = to_transformers(state)
            config = runtime_module.current().session.config
            trust = (named_types(config.allowed_types), config.trust_pickles)
            content = None if user_content is None else saved_bytes(user_content, "user_content", *trust)
            store = open_store(path)
            write_full(store, tag, state, optimizer_state, content, {"world_size": size()})
            write_newest(store, tag)


def write_full(
    store: Store, tag: str, state: Any, optimizer_state: Any, content: bytes | None, facts: Mapping[str, Any]
) -> None:
    """Write the files of a full checkpoint; what is None has no file. Local, on one rank. Raises CheckpointError when
    one cannot be written; what was there before is untouched then.
    """
    draft = Draft(store, tag, is_full=True)
    records: dict[str, FileRecord] = {}
    draft.start()
    try:
        if state is not None:
            records[tag] = write_torch_file(draft.store, tag, state)
        if optimizer_state is not None:
            records[_optimizer_name(tag)] = write_torch_file(draft.store, _optimizer_name(tag), optimizer_state)
        if content is not None:
            records[_content_name(tag)] = draft.store.write(_content_name(tag), content)
        draft.commit(records, {"kind": "full", **facts})
    except BaseException:
        draft.discard()
        raise
    for name in {tag, _optimizer_name(tag), _content_name(tag)} - records.keys():
        store.remove(name, missing_ok=True)  # of an earlier checkpoint of this tag, which had more


def load_full(
    path: str | os.PathLike[str],
    tag: str,
    *,
    model: DistributedModel | None,
    optimizer: DistributedOptimizer | None = None,
    strict: bool = True,
    translate_function: Translate | None = None,
    allowed_types: Sequence[Allowed] = (),
    trust_pickles: bool = False,
) -> Any:
    """Load a full checkpoint, or an ordinary state dict; returns its user content, None if there is none. Collective
    over the world; before the first step of a pipeline, too.

    Args:
        path, tag: as of `save_full`. With the tag ``pytorch_model.bin`` also what else transformers writes, if that is
            all there is: safetensors, or several files with an index.
        model: gets the weights; None: they are not read. Names of transformers are translated for the families in it.
        optimizer: gets its state if there is one in the checkpoint.
        strict: as ``model.load_state_dict`` has it.
        translate_function: makes from the state dict in the file one under our names, instead of the pairs of the
            families.
        allowed_types, trust_pickles: see user_content.py.

    A local file is mapped into memory, so that the processes of a host share what they read of it, and each copies its
    own part only. Raises CheckpointNotFoundError, CheckpointCorruptError, CheckpointError for classes that are not
    allowed, RuntimeError for names or shapes that do not fit; on all ranks. Source: smp-api section 14.
    """
    path = os.fspath(path)
    check_tag(tag)
    state: dict[str, Any] | None = None
    optimizer_state = content = None
    with agreed():  # before anything of it is opened on any rank
        store = open_store(path)
        record = _checked_record(store, tag)
    with agreed():
        files = {} if record is None else record.files
        if model is not None:
            name = file_of(store, tag, tag) if tag in files else find_weights(path, tag)
            state = _weights_of(model, path, name, translate_function, trust_pickles)
        elif record is None and not store.exists(tag):
            raise CheckpointNotFoundError(f"there is no full checkpoint {tag!r} in {shown(path)!r}: check path and tag")
        name = _optimizer_name(tag)
        if optimizer is not None and name in files:
            place = file_of(store, tag, name)
            optimizer_state = read_restricted(store, place, "optimizer state", allowed_types, trust_pickles, mmap=True)
        name = _content_name(tag)
        # A file without a record beside an ordinary state dict counts, too: it is where the original has it.
        if record is None or name in files:
            content = read_user_content(store, file_of(store, tag, name), allowed_types, trust_pickles)
    if model is not None and state is not None:
        model.load_state_dict(state, strict=strict)  # masters of a half model follow by themselves
    if optimizer is not None and optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    return content


def check_tag(tag: str) -> None:
    """Raise CheckpointError unless the tag can be the name of a file in the folder. Local."""
    if not isinstance(tag, str) or not tag or tag in (".", "..") or any(sign in tag for sign in "/\\\0:"):
        raise CheckpointError(
            f"tag={tag!r}: a tag becomes the name of a file; give a string without '/', '\\' and ':', such as 'step100'"
        )


def _checked_record(store: Store, tag: str) -> CompletionRecord | None:
    """The record of the checkpoint, if it has one; this rank's share of the files is what was written."""
    try:
        record = read_record(store, tag, is_full=True)
    except CheckpointNotFoundError:
        if is_unfinished(store, tag, is_full=True):
            raise
        return None
    problems = problems_of(store, tag, (rank(), size()), is_full=True)
    if problems:
        raise CheckpointCorruptError(
            f"the full checkpoint {tag!r} in {shown(store.path_of())!r} is damaged: {'; '.join(problems[:5])}. Load "
            "another one"
        )
    return record


def _weights_of(
    model: DistributedModel, path: str, name: str, translate_function: Translate | None, trust_pickles: bool
) -> dict[str, Any]:
    """Under the names of the model, with the mark that says so."""
    state: Mapping[str, Any] = read_weights(path, name, trust_pickles)
    is_ours = state.get(PARTIAL_KEY) is False
    if translate_function is not None:
        state = translate_function(state)
    elif not is_ours:
        state = model_states.translated(model, state)
    return {**model_states.with_tied_names(model, state), PARTIAL_KEY: False}


def _optimizer_name(tag: str) -> str:
    return f"optimizer_{tag}"


def _content_name(tag: str) -> str:
    return f"user_content_{tag}"
