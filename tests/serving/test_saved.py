"""Conversations that outlive the process: found again by prefix, or not at all where anything does not fit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

import flashmoe
from flashmoe.engines.llamacpp.library import Library
from flashmoe.errors import FlashMoEWarning
from tests.conftest import Tiny

PROMPTS = [list(range(65, 65 + 48)), list(range(97, 97 + 20))]


def session(
    path: Path, lib: Library, file: Path, prompts: list[list[int]] = PROMPTS, **options: Any
) -> list[tuple[str, int]]:
    """Continue prompts in a session of their own: texts, and how many tokens of each prompt were there already."""
    settings = {"cache": "80%", "threads": 1, "n_ctx": 128, "parallel": 2, "layout": "plain"} | options
    with flashmoe.load(path, library=lib, save_cache=file, **settings) as model:
        answers = [
            model.server().ask("POST", "/completion", {"prompt": prompt, "n_predict": 6, "temperature": 0})
            for prompt in prompts
        ]
    return [(answer["content"], answer["timings"]["cache_n"]) for answer in answers]


def state_files(file: Path) -> list[Path]:
    return sorted(file.with_suffix(".conversations").glob("*.state"))


@pytest.mark.parametrize("name", ["llama", "qwen3next", "gpt-oss"])
def test_a_restart_costs_new_tokens_only(name: str, lib: Library, tiny: Tiny, tmp_path: Path) -> None:
    """Attention, a recurrent memory, a sliding window."""
    file = tmp_path / "s.safetensors"
    first = session(tiny(name), lib, file)
    assert [reused for _, reused in first] == [0, 0]
    assert len(state_files(file)) == 2
    longer = [[*prompt, 70, 71, 72] for prompt in PROMPTS]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FlashMoEWarning)
        again = session(tiny(name), lib, file, longer)
    # a memory that cannot be cut anywhere comes back to a checkpoint, if it has one before the end
    assert all(reused >= len(prompt) - 8 for (_, reused), prompt in zip(again, PROMPTS, strict=True)) or (
        name == "qwen3next"
    )
    assert len(state_files(file)) == 2


def test_the_same_prompt_again_is_one_token(lib: Library, tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    texts = [text for text, _ in session(tiny("llama"), lib, file)]
    again = session(tiny("llama"), lib, file)
    assert [reused for _, reused in again] == [len(prompt) - 1 for prompt in PROMPTS]
    assert [text for text, _ in again] == texts


def test_files_are_their_users_alone(lib: Library, tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    session(tiny("llama"), lib, file)
    folder = file.with_suffix(".conversations")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_damaged_states_are_never_given_to_the_library(lib: Library, tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    session(tiny("llama"), lib, file)
    data = bytearray(state_files(file)[0].read_bytes())
    data[len(data) // 2] ^= 1
    state_files(file)[0].write_bytes(data)
    state_files(file)[1].write_bytes(b"short")
    with pytest.warns(FlashMoEWarning, match="a conversation is not given back"):
        again = session(tiny("llama"), lib, file)
    assert [reused for _, reused in again] == [0, 0]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "flashmoe-conversations"}', "\x00"])
def test_damaged_lists_are_a_cold_start(text: str, lib: Library, tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    session(tiny("llama"), lib, file)
    (file.with_suffix(".conversations") / "conversations.json").write_text(text)
    with pytest.warns(FlashMoEWarning, match="list of saved conversations is damaged"):
        assert [reused for _, reused in session(tiny("llama"), lib, file)] == [0, 0]
    assert [reused for _, reused in session(tiny("llama"), lib, file)] != [0, 0]


def test_lists_that_name_other_places_are_not_followed(lib: Library, tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    session(tiny("llama"), lib, file)
    listed = file.with_suffix(".conversations") / "conversations.json"
    content = json.loads(listed.read_text())
    state = state_files(file)[0]
    state.rename(tmp_path / state.name)
    content["conversations"] = [[f"../{state.name}", *content["conversations"][0][1:]]]
    listed.write_text(json.dumps(content))
    assert [reused for _, reused in session(tiny("llama"), lib, file)] == [0, 0]


def test_another_model_or_kind_of_cache_starts_cold(lib: Library, tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    session(tiny("llama"), lib, file)
    assert [reused for _, reused in session(tiny("llama"), lib, file, cache_type_k="f32")] == [0, 0]
    with pytest.warns(FlashMoEWarning):  # the experts' file is another model's, too
        assert [reused for _, reused in session(tiny("olmoe"), lib, file)] == [0, 0]


def test_size_bounds_what_is_kept(lib: Library, tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    session(tiny("llama"), lib, file)
    large, small = sorted((path.stat().st_size for path in state_files(file)), reverse=True)
    session(tiny("llama"), lib, file, save_cache_size=large + small - 1)
    assert [path.stat().st_size for path in state_files(file)] == [large]
    session(tiny("llama"), lib, file, save_cache_size=0)
    assert [path.stat().st_size for path in state_files(file)] == [
        large
    ]  # as it was: nothing is kept or dropped


def test_a_folder_that_cannot_be_made_is_a_warning(lib: Library, tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    file.with_suffix(".conversations").write_text("in the way")
    with pytest.warns(FlashMoEWarning, match="conversations will not be kept"):
        session(tiny("llama"), lib, file)
    assert file.exists()
