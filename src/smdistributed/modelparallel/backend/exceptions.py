"""The public exceptions under the path where training toolkits look them up by name; the same classes as ours."""

import sys

import modelparallel.exceptions

sys.modules[__name__] = modelparallel.exceptions
