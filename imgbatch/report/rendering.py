"""Pages from templates, in which all that comes from a manifest, a model or an error is escaped.

jinja2 comes with the ``report`` extra.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from imgbatch.errors import UsageError
from imgbatch.report import figures


def check_installed() -> None:
    """Raise :class:`UsageError` in one line where the ``report`` extra is missing."""
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise UsageError("the report needs jinja2, which pip install 'imgbatch[report]' brings") from error
    figures.check_installed()


def render(template: str, **values: Any) -> str:
    """A page of the package's ``templates``; every value is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True,
        loader=PackageLoader("imgbatch.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "count": lambda value: f"{value:,}",
        "percent": percent,
        "number": number,
        "signed": signed,
        "when": when,
        "short": figures.shorten,
        "duration": duration,
        "breakable": lambda text: Markup("_<wbr>").join(text.split("_")),
    }
    environment.filters |= filters
    return environment.get_template(template).render(values)


def percent(share: float | None, digits: int = 1) -> str:
    """A share as per cent; what is not all never reads as all, and what is not nothing never as nothing."""
    if share is None:
        return "–"
    text = f"{share:.{digits}%}"
    if share < 1 and text == f"{1:.{digits}%}":
        return f">{1 - 0.1 ** (digits + 2):.{digits}%}"
    if share > 0 and text == f"{0:.{digits}%}":
        return f"<{0.1 ** (digits + 2):.{digits}%}"
    return text


def signed(share: float | None) -> str:
    """A difference of shares in per cent, its sign always there."""
    return "–" if share is None else f"{share:+.1%}".replace("-", "−")


def number(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits, thousands apart."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def when(moment: str) -> str:
    """An ISO 8601 moment, for a person: ``2 Jan 2026, 03:04 UTC``."""
    parsed = datetime.fromisoformat(moment).astimezone(UTC)
    return f"{parsed.day} {parsed:%b %Y, %H:%M} UTC"


def duration(seconds: float) -> str:
    """``48 s``, ``12 min`` or ``7.5 h``."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
