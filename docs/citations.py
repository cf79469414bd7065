"""How docstrings and pages cite the specification: "smp-api section 5". Read by the site and by its test."""

import re

#: The pages of docs/specification by the names under which they are cited, and the form of their anchors.
PAGES = {
    "smp-api": ("api", "section-{}"),
    "smp-config": ("configuration", "section-{}"),
    "smp-semantics-checks": ("checks", "check-{}"),
    "clients": ("clients", "section-{}"),
}
NUMBER = r"\d+(?:\.\d+)*"
#: Of a page (the first group) one number or several (the second).
CITATION = re.compile(rf"\b({'|'.join(PAGES)})(?: sections?)? ({NUMBER}(?:(?:, and |, | and ){NUMBER})*)")
