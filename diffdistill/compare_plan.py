"""compare.json: what a comparison decided for each method, shared by all calls and processes that use its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from diffdistill.errors import UserError
from diffdistill.run_folder import RunFolder, read_json

SCHEMA = 1


@dataclass(frozen=True)
class Plan:
    """folder: of the comparison.  shared: the settings in which all calls into it must agree, by configuration key."""

    folder: Path
    shared: Mapping[str, Any]

    def methods(self) -> dict[str, dict[str, Any]]:
        """Method -> its overrides of train (`words`), `steps`, student `updates`, `machine`, and `error` if it failed.

        Raises UserError if the folder holds something else, a newer schema, or a comparison under other settings.
        """
        file = self.folder / "compare.json"
        if not file.is_file():
            RunFolder(self.folder).refuse_occupied("out")
            return {}
        stored = read_json(file, "out")
        if stored.get("schema") != SCHEMA:
            given = f"{file} of schema {stored.get('schema')}"
            raise UserError("out", f"must hold a comparison of schema {SCHEMA}", given, "Name another folder.")
        for key, ours in self.shared.items():
            if stored.get(key) != ours:
                fix = "Name another folder, or leave the settings as they were."
                raise UserError(key, f"must be {stored.get(key)}, as in the comparison that goes on", ours, fix)
        return dict(stored["methods"])

    def decide(self, name: str, decision: Mapping[str, Any]) -> dict[str, Any]:
        """Keep what was decided for a method; returns what stands, another process's decision if it came first."""
        with FileLock(self.folder / ".lock"):
            methods = self.methods()
            standing = methods.setdefault(name, dict(decision))
            self._write(methods)
            return standing

    def note(self, name: str, error: str | None) -> None:
        """Keep how a method ended: its error, None takes an earlier one back."""
        with FileLock(self.folder / ".lock"):
            methods = self.methods()
            if methods[name].get("error") != error:
                methods[name] = {**methods[name], "error": error}
                self._write(methods)

    def _write(self, methods: Mapping[str, Any]) -> None:
        aside = self.folder / ".compare.json"
        aside.write_text(json.dumps({"schema": SCHEMA, **self.shared, "methods": methods}, indent=1) + "\n")
        aside.replace(self.folder / "compare.json")  # whole or not at all
