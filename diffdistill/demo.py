"""`diffdistill demo`: a page on this machine that shows a teacher and its student side by side, from the same seed."""

from __future__ import annotations

import importlib.util
import ipaddress
import socket

from rich.console import Console

from diffdistill.demo_sides import Measured, check_pair, load_student, load_teacher
from diffdistill.errors import UserError
from diffdistill.run_folder import say


def demo(pipeline: str, teacher: str | None, host: str, port: int, dry_run: bool) -> int:
    """Load both, run each once, and serve the page until Ctrl-C; returns the status, 0.

    pipeline: of the student, a folder or hub id.  teacher: a pipeline folder, hub id, asset:NAME or the folder of a
    UNet2DModel; None shows the student alone.  host, port: to listen at.
    Raises UserError, before anything is served, if either cannot be loaded, the two do not belong together, the
    address cannot be listened at or gradio is missing.
    """
    _check_address(host, port)
    if not dry_run:
        _check_gradio()
    student = load_student(pipeline)
    other = None if teacher is None else load_teacher(teacher, student)
    check_pair(student, other)
    sides = [Measured("student", student)]
    if other is not None:
        sides.insert(0, Measured("teacher", other))
    if dry_run:
        Console().print("dry run: both run, nothing was served.")
        return 0
    from diffdistill.demo_page import serve

    if not _is_loopback(host):
        say(f"whoever reaches this machine at {host}:{port} can use the page: it asks for no password.")
    serve(sides, host, port, lambda url: Console().print(f"{url}  (Ctrl-C ends it)", soft_wrap=True, highlight=False))
    return 0


def _check_gradio() -> None:
    if importlib.util.find_spec("gradio") is None:
        fix = 'Install the extra: pip install "diffdistill[demo]".'
        raise UserError("demo", "needs the package gradio", "nothing of that name", fix)


def _check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be listened at."""
    if not 1 <= port <= 65535:
        raise UserError("port", "must lie in 1..65535", port, "7860 is the default.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
        if not host:
            raise OSError("no name")
    except (OSError, UnicodeError) as error:
        raise UserError(
            "host", "must be an address of this machine", repr(host), "127.0.0.1 is the default."
        ) from error
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except PermissionError as error:
            raise UserError("port", "must be one that you may listen at", port, "Take one above 1023.") from error
        except OSError as error:
            if error.errno is not None and "in use" not in str(error):
                fix = "127.0.0.1 is the default."
                raise UserError("host", "must be an address of this machine", repr(host), fix) from error
            raise UserError("port", "must be free", port, "Name another: port=7861.") from error


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
