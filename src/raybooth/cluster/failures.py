"""What Ray wraps in its errors, and how they are told."""

import contextlib
from collections.abc import Iterator

from raybooth.errors import RayboothError


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Raise the RayboothError of a worker as itself, however deeply Ray has wrapped it."""
    try:
        yield
    except RayboothError:
        raise
    except Exception as error:
        ours = next((e for e in causes(error) if isinstance(e, RayboothError)), None)
        if ours is None:
            raise
        raise ours from None


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and all that Ray has wrapped in it."""
    waiting, seen = [error], set()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        inner = [getattr(one, name, None) for name in ("__cause__", "__context__", "cause", "health_check_failure", "controller_failure")]
        inner += list((getattr(one, "worker_failures", None) or {}).values())
        waiting += [e for e in inner if isinstance(e, BaseException)]


def last_line(error: BaseException | str) -> str:
    """The last line of an error's text, which says what is wrong, as a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1][:300].rstrip(".") + "."
