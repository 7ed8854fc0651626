"""Named compression profiles: YAML, one plan under each name."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from winnow.engine.compression.plan import Plan
from winnow.engine.errors import RequestError

PROFILES = Path(__file__).parents[2] / "configs" / "profiles.yaml"
"""The profiles that come with Winnow"""


def load_profiles(path: Path | str = PROFILES) -> dict[str, Plan]:
    """The plans of a profile file, by name.

    Raises ValueError, which names the file and the field, if the file cannot be read or a profile is wrong.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: must be a mapping of profile names to plans")
    for name in data:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{path}: {name!r} is no name for a profile; put it in quotes")
    try:
        return {name: Plan.parse(plan, at=name) for name, plan in data.items()}
    except RequestError as error:
        raise ValueError(f"{path}: {error.message}") from None


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets a key stand twice and the last one win; a profile that is lost that way is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        if len(set(map(str, keys))) < len(keys):
            raise yaml.constructor.ConstructorError(None, None, "a key stands twice", node.start_mark)
        return super().construct_mapping(node, deep)
