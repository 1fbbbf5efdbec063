"""Places as users write them: paths, s3://, and what is neither; in settings and on the command."""

import pickle
from pathlib import Path

import pytest
from click.testing import CliRunner

from domains.base import BadInputError
from flows.answers import restored_text
from flows.cli import cli
from flows.config import RestoreSettings
from flows.console import jsonable
from flows.engine.objects import LocalObjects, open_objects
from flows.roots import S3Root, parse_root


@pytest.mark.parametrize(
    ("text", "bucket", "prefix"),
    [
        ("s3://lab-1/a/b", "lab-1", "a/b"),
        ("s3://lab/", "lab", ""),
        ("s3://lab", "lab", ""),
        ("s3://lab/a/", "lab", "a"),
    ],
)
def test_a_prefix_is_parsed_and_written_the_same_everywhere(text, bucket, prefix):
    root = parse_root(text)
    assert isinstance(root, S3Root)
    assert (root.bucket, root.prefix) == (bucket, prefix)
    assert parse_root(str(root)) == root == pickle.loads(pickle.dumps(root))  # noqa: S301
    assert {root: 1}[parse_root(text)] == 1
    assert str(root / "items/x") == f"s3://{bucket}/{prefix + '/' if prefix else ''}items/x"
    assert jsonable({"output": root}) == {"output": str(root)}


def test_a_path_stays_one(tmp_path):
    assert parse_root(tmp_path) == parse_root(str(tmp_path)) == tmp_path
    assert isinstance(open_objects(tmp_path), LocalObjects)
    assert parse_root("s3") == Path("s3")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("s3://", "no bucket's name"),
        ("s3://A_B/x", "no bucket's name"),
        ("s3://lab/a/../b", "cannot be a prefix"),
        ("s3://lab/a//b", "cannot be a prefix"),
        ("s3://lab/a?b", "cannot be a prefix"),
        ("gs://lab/a", "only a path"),
        ("https://s3.example.org/lab", "only a path"),
        (Path("s3://lab/a"), "only a path"),
    ],
)
def test_what_is_neither_is_refused_in_a_sentence(text, reason):
    with pytest.raises(BadInputError, match=reason):
        parse_root(text)


def test_settings_hold_roots_and_survive_json(tmp_path):
    settings = RestoreSettings(input=tmp_path, output="s3://lab/out")
    assert (settings.input, settings.output) == (tmp_path, S3Root("lab", "out"))
    assert RestoreSettings.model_validate_json(settings.model_dump_json()) == settings
    assert RestoreSettings.model_json_schema()["properties"]["output"]["type"] == "string"


def test_commands_that_need_a_folder_refuse_a_url_and_make_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["generate", "--domain", "ct", "--output", "s3://lab/x"])
    assert isinstance(done.exception, BadInputError)
    assert "only a path can be used here" in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_the_answer_says_that_on_s3_there_are_no_files():
    from flows.api_restore import RestoreResult
    from flows.engine.account import Book

    def told(output) -> str:
        nothing = Book().account()
        result = RestoreResult(output, "c", (object(),), 0, (), (), 1, 1, 0, 1.0, account=nothing)
        return restored_text(result)

    assert "in s3://lab/x; on S3 no files are written for other tools" in told(S3Root("lab", "x"))
    assert "on S3" not in told(Path("out"))
