"""Jinja templates -> configuration files."""

from __future__ import annotations

from typing import Any

import jinja2

from hostos.build import profile as profiles
from hostos.build.kconfig import format_option
from hostos.build.profile import Profile
from hostos.errors import UserError


def render(template: str, **context: Any) -> str:
    """Render `configs/<template>`. Raises `UserError` naming file and line when it is wrong or uses
    something undefined."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(profiles.CONFIGS),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["kernel_option"] = lambda option: format_option(option, "CONFIG_")
    environment.filters["buildroot_option"] = lambda option: format_option(option, "BR2_")
    try:
        return environment.get_template(template).render(**context)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"configs/{template}:{error.lineno}: {error.message}") from None
    except jinja2.TemplateNotFound:
        raise UserError(f"configs/{template} is missing", "restore it: git checkout configs") from None
    except jinja2.UndefinedError as error:
        raise UserError(f"configs/{template}: {error.message}") from None


def linux_config(profile: Profile) -> str:
    """The kernel config fragment of a profile."""
    return render("linux.config.j2", profile=profile)


def show(profile: Profile, engine: str) -> str:
    """The rendered configuration of "linux" or "buildroot". Raises `UserError` for another name."""
    if engine == "linux":
        return linux_config(profile)
    if engine == "buildroot":
        from hostos.build.engines.buildroot_config import preview

        return preview(profile)
    raise UserError(f"there is no configuration {engine!r}", "one of: linux, buildroot")
