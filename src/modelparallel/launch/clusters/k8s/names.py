"""What Kubernetes takes for a name, a label, a quantity, an image: asked before anything is sent.

The API server says the same, but one thing at a time, after the job was submitted, or never: a limit of "64gb" is
refused, a limit of "64m" is 0.064 bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction

MAX_LABEL = 63
MAX_SUBDOMAIN = 253

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(rf"{_LABEL.pattern}(\.{_LABEL.pattern})*")
_QUALIFIED = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
_QUANTITY = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(?:([eE][+-]?\d+)|(m|k|[MGTPE]i?|Ki))?")
_SCALES = {"m": Fraction(1, 1000), "k": Fraction(1000)} | {
    letter + end: Fraction(base**power)
    for power, letter in enumerate("KMGTPE", 1)
    for end, base in (("", 1000), ("i", 1024))
    if letter + end != "K"
}
_SECRET_KEY = re.compile(r"[-._a-zA-Z0-9]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_IMAGE_PATH = re.compile(r"[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*")
_IMAGE_END = re.compile(r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?")


def check_label_name(text: str, what: str, *, begins_with_letter: bool = False) -> str:
    """A DNS label (RFC 1123; RFC 1035 if it begins with a letter): a namespace, a job. Raises `ValueError`."""
    if not _LABEL.fullmatch(text) or len(text) > MAX_LABEL or (begins_with_letter and not text[0].isalpha()):
        letter = "a letter" if begins_with_letter else "a letter or digit"
        raise ValueError(
            f"{what} {text!r}: expected lower-case letters, digits and '-', at most {MAX_LABEL}, {letter} first and a "
            f"letter or digit last{_suggestion(text, begins_with_letter)}"
        )
    return text


def check_object_name(text: str, what: str) -> str:
    """A DNS subdomain (RFC 1123): a claim, a secret, a service account. Raises `ValueError`."""
    if not _SUBDOMAIN.fullmatch(text) or len(text) > MAX_SUBDOMAIN:
        raise ValueError(
            f"{what} {text!r}: expected lower-case letters, digits, '-' and '.', at most {MAX_SUBDOMAIN}, a letter or "
            f"digit first and last{_suggestion(text, False)}"
        )
    return text


def check_label_key(text: str, what: str) -> str:
    """A key of a label, an annotation, or the name of a resource: `name` or `domain/name`. Raises `ValueError`."""
    prefix, slash, name = text.rpartition("/")
    if slash:
        check_object_name(prefix, f"{what} {text!r}: before the '/':")
    if not _QUALIFIED.fullmatch(name) or len(name) > MAX_LABEL:
        raise ValueError(
            f"{what} {text!r}: expected letters, digits, '-', '_' and '.', at most {MAX_LABEL}, with or without "
            "a domain and '/' before it"
        )
    return text


def check_label_value(text: str, what: str) -> str:
    """The value of a label. Raises `ValueError`."""
    if text and (not _QUALIFIED.fullmatch(text) or len(text) > MAX_LABEL):
        raise ValueError(
            f"{what} {text!r}: expected letters, digits, '-', '_' and '.', at most {MAX_LABEL}, "
            "a letter or digit first and last"
        )
    return text


def check_labels(labels: Mapping[str, str], what: str) -> None:
    """Keys and values of labels. Raises `ValueError`."""
    for key, value in labels.items():
        check_label_key(key, what)
        check_label_value(value, f"{what} {key}:")


def check_variable(text: str, what: str) -> str:
    """The name of an environment variable. Raises `ValueError`."""
    if not _VARIABLE.fullmatch(text):
        raise ValueError(f"{what} {text!r}: expected the name of a variable: letters, digits and '_', no digit first")
    return text


def parse_secret(text: str, what: str) -> tuple[str, str]:
    """Name and key of `name/key`. Raises `ValueError`."""
    name, slash, key = text.partition("/")
    if not slash or ":" in name or not _SECRET_KEY.fullmatch(key):
        raise ValueError(
            f"{what} {text!r}: on Kubernetes a secret is given as NAME/KEY of a Secret of the namespace "
            "(kubectl create secret generic NAME --from-literal=KEY=...)"
        )
    return check_object_name(name, f"{what}: secret"), key


def quantity(text: str | int | float, what: str) -> Fraction:
    """The number that `64Gi`, `500m` or `8` stands for. Raises `ValueError`."""
    found = None if isinstance(text, bool) else _QUANTITY.fullmatch(str(text))
    if found is None:
        raise ValueError(
            f"{what} {text!r}: expected a number, with one of m, k, M, G, T, P, E, Ki, Mi, Gi, Ti, Pi, Ei "
            f"or nothing after it{_nearest_quantity(str(text))}"
        )
    exponent, scale = found[2], found[3]
    return Fraction(found[1]) * (Fraction(f"1{exponent}") if exponent else _SCALES[scale] if scale else 1)


def check_image(text: str, what: str) -> str:
    """The name of a container image. Raises `ValueError`."""
    host, slash, path = text.partition("/")
    # The first part is a registry if it looks like a host: with a dot, a port, or "localhost".
    if not slash or not ("." in host or ":" in host or host == "localhost"):
        path = text
    cut = min((place for place in (path.find(":"), path.find("@")) if place >= 0), default=len(path))
    if not _IMAGE_PATH.fullmatch(path[:cut]) or not _IMAGE_END.fullmatch(path[cut:]):
        raise ValueError(
            f"{what} {text!r}: expected the name of an image, registry.example.com/team/name:tag, "
            "lower case, without a scheme"
        )
    return text


def _suggestion(text: str, begins_with_letter: bool) -> str:
    made = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if begins_with_letter:
        made = re.sub(r"^[^a-z]+", "", made)
    made = made[:MAX_LABEL].rstrip("-")
    return f": for example {made!r}" if made and made != text else ""


def _nearest_quantity(text: str) -> str:
    found = re.fullmatch(r"\s*([\d.]+)\s*([kKmMgGtTpPeE])[iI]?[bB]?\s*", text)
    return f": did you mean '{found[1]}{found[2].upper()}i'?" if found else ""
