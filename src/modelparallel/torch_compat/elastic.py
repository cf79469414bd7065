"""torch's elastic agent, imported only by who starts processes."""

from __future__ import annotations

import inspect
from typing import Any

from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent


class IndependentAgent(LocalElasticAgent):
    """An agent that returns when its own processes have ended.

    torch's waits for those of other hosts to end, too, five minutes at most, and hears nothing of their failures
    meanwhile. There is no argument to leave that out (a time limit of nothing means none).
    """

    def _exit_barrier(self) -> None:
        return None

    @classmethod
    def known(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Those of the options that this version of torch has."""
        parameters = inspect.signature(LocalElasticAgent).parameters
        return {name: value for name, value in options.items() if name in parameters}
