"""What a pipeline is handed from Python, and what is left of it when it is closed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mortice
from mortice.core.config import ModelConfig
from mortice.core.errors import InputError
from tests.support.resources import mapped
from tests.support.tiny import tiny

Use = Callable[[Any], object]


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[mortice.Pipeline]:
    with mortice.load(tiny(tmp_path), executor="reference") as loaded:
        yield loaded


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda pipe: pipe.complete_many(["a", 3]), "prompt 1: prompt: found 3, wanted text or token ids"),
        (lambda pipe: pipe.complete_many(["a", {}]), "prompt 1: prompt: found no tokens"),
        (lambda pipe: pipe.complete_many(None), "prompts: found None, wanted a list of them"),
        (lambda pipe: pipe.complete_many({"prompt": "a"}), "prompts: found {'prompt': 'a'}, wanted a list of them"),
        (lambda pipe: pipe.generate_many(3), "prompts: found 3, wanted a list of them"),
        (lambda pipe: pipe.generate(None), "prompt: found None, wanted text or token ids"),
        (lambda pipe: pipe.generate(b"abc"), "prompt: found b'abc', wanted text or token ids"),
        (lambda pipe: pipe.generate([1, "a"]), "prompt: found [1, 'a'], wanted text or token ids"),
        (lambda pipe: pipe.generate([1, 2.5]), "prompt: found [1, 2.5], wanted text or token ids"),
        (lambda pipe: pipe.generate({"prompt": "a"}), "prompt: found {'prompt': 'a'}, wanted text or token ids"),
        (lambda pipe: pipe.logits(None), "prompt: found None, wanted token ids"),
        (lambda pipe: pipe.logits("abc"), "prompt: found 'abc', wanted token ids"),
    ],
)
def test_a_prompt_that_is_none_is_refused_by_its_argument(pipe: mortice.Pipeline, use: Use, message: str) -> None:
    with pytest.raises(InputError) as caught:
        use(pipe)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (mortice.load, "model: found None, wanted a file, a folder or a RunConfig"),
        (mortice.prepare, "config: found None, wanted a RunConfig; mortice.load takes a file"),
        (mortice.validate, "path: found None, wanted a model file or folder"),
    ],
)
def test_a_model_that_is_none_is_refused(use: Use, message: str) -> None:
    with pytest.raises(InputError) as caught:
        use(None)
    assert str(caught.value) == message


def test_arrays_and_iterators_of_token_ids_are_prompts(pipe: mortice.Pipeline) -> None:
    given: list[Any] = [[1, 2, 3], (1, 2, 3), np.array([1, 2, 3]), iter([1, 2, 3])]
    answers = [[piece.id for piece in pipe.generate(prompt, max_tokens=3)] for prompt in given]
    assert answers == [answers[0]] * 4
    assert pipe.logits(np.array([1, 2])).shape == (2, pipe.program.vocab_size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "use",
    [
        lambda pipe: pipe.logits([1, 2]),
        lambda pipe: pipe.generate("a"),
        lambda pipe: pipe.complete_many(["a"]),
        lambda pipe: pipe.preload(),
        lambda pipe: pipe.session(),
        lambda pipe: pipe.runtime,
    ],
)
@pytest.mark.parametrize("resident", [True, False])
def test_a_closed_pipeline_uploads_nothing_again(tmp_path: Path, use: Use, resident: bool) -> None:
    path = tiny(tmp_path)
    config = mortice.RunConfig(model=ModelConfig(path=path))
    pipe = mortice.load(path, executor="reference") if resident else mortice.prepare(config)
    pipe.close()
    with pytest.raises(InputError, match="the pipeline is closed; load the model again"):
        use(pipe)
    pipe.close()


def test_a_session_of_a_closed_pipeline_is_refused_and_can_be_closed(pipe: mortice.Pipeline) -> None:
    with pipe.session() as session:
        session.feed([1, 2])
        pipe.close()
        with pytest.raises(InputError, match="closed"):
            session.feed([3])


def test_a_closed_pipeline_that_is_kept_lets_go_of_its_files_but_tells_what_it_was(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    pipe = mortice.load(path, executor="reference")
    told = pipe.plan.file_bytes, pipe.plan.bytes_by_qtype, pipe.fit
    assert mapped(path)
    pipe.close()
    assert not mapped(path)
    assert (pipe.plan.file_bytes, pipe.plan.bytes_by_qtype, pipe.fit) == told
    with pytest.raises(InputError, match=r"rows 0 to 1 cannot be read: the model is closed"):
        pipe.plan.weights[0].tensor.row_bytes(0, 1)
