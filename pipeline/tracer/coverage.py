"""What no tracer, or not every one, can see: the kinds of bind that a tier misses, under the names that are published.

In: a tier and the hooks that could be attached. Out: names of gaps. Every gap has a test that makes such a bind and
sees no event, and every bind without a gap has one that sees exactly one: the list is a promise, in both directions.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

GAPS: Final = {
    "autobind": "ports that the kernel gives without a bind(): connect(), sendto(), listen()",
    "sctp_bindx": "addresses that an SCTP socket adds with sctp_bindx()",
    "io_uring-refused": "binds that io_uring itself refuses: of what is no socket, or with a length over 128",
    "io_uring-failed": "binds through io_uring that fail",
    "io_uring": "binds through io_uring",
    "kernel": "binds that the kernel makes for itself, such as the port of a vxlan device",
    "compat-failed": "binds by 32-bit processes that fail",
    "compat": "binds by 32-bit processes",
    "unhooked-raw": (
        "binds through io_uring or by 32-bit processes of RAW and ping sockets, "
        "and of sockets with IP_BIND_ADDRESS_NO_PORT to port 0"
    ),
    "no-socket": "binds of a descriptor that is no socket (EBADF, ENOTSOCK)",
    "bad-length": "binds with an address length that the kernel refuses unread (negative, or more than 128)",
    "denied": "binds that a security module denies",
}
"""Every gap by its name, as the end of the sentence "not seen are …"."""

EVERYWHERE: Final = ("autobind", "sctp_bindx", "io_uring-refused")
"""What no tier sees."""

_OF_TRACEPOINT: Final = ("io_uring-failed", "compat-failed", "unhooked-raw")

# What is not seen when this function could not be hooked.
_OF_FUNCTION: Final = {
    "__sys_bind": ("no-socket", "bad-length"),
    "security_socket_bind": ("denied",),
}


def of_tracepoints(post_bind: bool) -> tuple[str, ...]:
    """Gaps of the tier ``tracepoint``, with or without the programs at ``post_bind``."""
    return EVERYWHERE + _OF_TRACEPOINT + (() if post_bind else ("io_uring", "compat", "kernel"))


def of_functions(unhooked: Collection[str]) -> tuple[str, ...]:
    """Gaps of a tier that hooks the kernel's functions, when these of them could not be hooked."""
    return EVERYWHERE + tuple(gap for function in unhooked for gap in _OF_FUNCTION.get(function, ()))
