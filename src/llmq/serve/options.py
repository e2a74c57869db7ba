"""What a server is told: the one home of its defaults."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass

from llmq.errors import USAGE, LlmqError


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """host               address to listen on
    port               0: any that is free
    api_keys           a client must show one of them; none: everybody is let in
    served_model_name  the model's name to clients; None: the model as it was named
    max_queue          prompts that may wait to be let in before clients are told to come back later
    request_timeout    seconds a request may take, the time in the queue included; None: any
    log_prompts        write prompts to the access log
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    served_model_name: str | None = None
    max_queue: int = 1024
    request_timeout: float | None = None
    log_prompts: bool = False

    def __post_init__(self) -> None:
        timeout = self.request_timeout
        checks = (
            (0 <= self.port < 2**16, "port", "from 0 to 65535"),
            (self.max_queue >= 1, "max_queue", "1 or more"),
            (timeout is None or (math.isfinite(timeout) and timeout > 0), "request_timeout", "above 0"),
        )
        for valid, name, rule in checks:
            if not valid:
                flag = f"--{name.replace('_', '-')}"
                raise LlmqError(f"{name} must be {rule}, not {getattr(self, name)}", f"check {flag}", exit_code=USAGE)
        if not all(self.api_keys):
            raise LlmqError("an API key is empty", "check --api-key", exit_code=USAGE)

    @property
    def reachable_by_others(self) -> bool:
        """Whether other machines can come to this address."""
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host != "localhost"
