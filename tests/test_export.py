"""The upload to the hub: what is sent, and that the token stays where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from simpo.compose import compose_run
from simpo.console import markdown_table
from simpo.train import train

TOKEN = "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"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Calls that would have gone to the hub, which is not reachable from a test."""
    calls: list[tuple[str, dict[str, Any]]] = []

    class Commit:
        commit_url = "https://hub.example/me/model/commit/1"

    def create_repo(self: object, repo_id: str, **options: Any) -> None:
        calls.append(("create_repo", {"repo_id": repo_id, **options}))

    def upload_folder(self: object, **options: Any) -> Commit:
        options["files"] = sorted(p.name for p in Path(options["folder_path"]).iterdir())
        calls.append(("upload_folder", options))
        return Commit()

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return calls


@pytest.mark.parametrize(("extra", "private"), [([], True), (["export.private=false"], False)])
def test_push_to_hub(
    extra: list[str],
    private: bool,
    hub: list[tuple[str, dict[str, Any]]],
    tiny_run: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    train(compose_run([*tiny_run, "export.push_to_hub=me/model", *extra, f"run_dir={folder}"]))
    (create, made), (upload, sent) = hub
    assert (create, upload) == ("create_repo", "upload_folder")
    assert made["repo_id"] == sent["repo_id"] == "me/model"
    assert made["private"] is private
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "curves.png"} <= set(
        sent["files"]
    )
    assert "https://hub.example/me/model/commit/1" in capsys.readouterr().out
    for file in folder.rglob("*"):
        if file.is_file():
            assert TOKEN.encode() not in file.read_bytes(), file


def test_nothing_is_uploaded_unless_asked_for(
    hub: list[tuple[str, dict[str, Any]]], tiny_run: list[str]
) -> None:
    train(compose_run(tiny_run))
    assert hub == []


def test_markdown_table() -> None:
    rows = [{"a": 1, "b": {"x": 2}}, {"a": 22, "b": 0}]
    assert markdown_table(rows) == [
        "| a  | b    |",
        "|----|------|",
        "| 1  | x: 2 |",
        "| 22 | 0    |",
    ]
