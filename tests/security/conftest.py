"""Files as an attacker would write them. Each carries a canary: a file that appears if anything of it is run."""

import json
import shutil
import struct

import pytest

from welltuned.cli.main import main


@pytest.fixture
def canary(tmp_path):
    """The file that must never appear, and the Python line that would make it."""

    class Canary:
        path = tmp_path / "canary"
        code = f"open({str(path)!r}, 'w').write('run')"

        def __reduce__(self):  # what a pickle of it runs
            return exec, (self.code,)

        @property
        def sang(self):
            return self.path.exists()

    return Canary()


@pytest.fixture
def model_copy(tiny_model_dir, tmp_path):
    """A folder of the tiny model that a test may spoil."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    return folder


@pytest.fixture
def change_json():
    """A function that changes keys of a JSON file; None removes one."""

    def change(path, **changes):
        value = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: v for key, v in value.items() if v is not None}))

    return change


@pytest.fixture
def refused(capsys, canary):
    """A function that runs a command, which must exit with 2 and one sentence, and nothing may have been run."""

    def refused(*arguments):
        code = main([str(argument) for argument in arguments])
        said = capsys.readouterr().err.strip()
        assert code == 2, said
        complaints = [line for line in said.splitlines() if line.startswith("welltuned:")]
        assert "Traceback" not in said and len(complaints) == 1, said
        assert said.endswith(complaints[0]) and not canary.sang
        return complaints[0]

    return refused


@pytest.fixture
def safetensors_bytes():
    """A function that puts a file together from a header, as JSON text or as an object, and bytes."""

    def build(header, data=b"", length=None):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    return build
