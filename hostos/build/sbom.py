"""The bill of materials of an OS, as CycloneDX 1.5 JSON (https://cyclonedx.org/docs/1.5/json/)."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from hostos import __version__
from hostos.build.engines import Built, Component
from hostos.build.profile import Profile


def cyclonedx(profile: Profile, built: Built) -> str:
    """No serial number and no time stamp: same inputs, same file."""
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "component": {"type": "operating-system", "name": f"hostos-{profile.target}", "version": __version__},
        },
        "components": [_component(each, profile.arch) for each in built.components],
    }
    return json.dumps(document, indent=1) + "\n"


def _component(component: Component, arch: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "library", "name": component.name, "version": component.version}
    if component.origin == "debian":
        # https://github.com/package-url/purl-spec, type deb
        version = quote(component.version, safe="")
        entry["purl"] = f"pkg:deb/debian/{component.name}@{version}?arch={arch}"
    else:
        entry["purl"] = f"pkg:generic/{component.name}@{quote(component.version, safe='')}"
    if component.sha256:
        entry["hashes"] = [{"alg": "SHA-256", "content": component.sha256}]
    if component.licence:
        entry["licenses"] = [{"expression": component.licence}]
    return entry
