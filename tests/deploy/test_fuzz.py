"""Damaged deployment files: read, or refused with the file named; never another error, never much time or memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations import mutations
from transload.deploy.load import load
from transload.errors import DeploymentError

FILES = sorted((Path(__file__).parents[2] / "deployments").glob("*.yaml"))
WORDS = (
    b"*a",
    b"&a ",
    b"!!python/object/apply:os.system [true]",
    b"{{",
    b"- " * 40,
    b"<<: *a\n",
    b"\t",
    b"9" * 400,
    b"? ",
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_damaged_file_is_read_or_refused_by_name(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "damaged.yaml"
    raw = path.read_bytes()
    for number, damaged in enumerate(mutations(raw, 1, 40)):
        place = (number * 7919) % (len(damaged) + 1)
        target.write_bytes(damaged[:place] + WORDS[number % len(WORDS)] * (number % 2) + damaged[place:])
        problem = "damaged.yaml"
        try:
            load(target)
        except DeploymentError as error:
            problem = str(error)
        assert "damaged.yaml" in problem
