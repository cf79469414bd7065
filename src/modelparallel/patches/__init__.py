"""``smp.patches``: the module path under which the original has its checkpoint functions (smp-api section 11)."""

from modelparallel.patches import checkpoint as checkpoint
