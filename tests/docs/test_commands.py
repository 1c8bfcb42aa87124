"""Every command line and Python block of the documentation is run, or says here why it isn't.

A page's lines run in their order in a folder of its own, on a tiny model and with less to do.
"""

import re
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.docs.pages import CURRENT, Line, blocks, command_lines
from tests.helpers import ROOT

ELSEWHERE = {"docs/quickstart.md": "test_examples.py", "docs/ci.md": "test_ci.py"}
"""Pages whose lines another test runs."""
PYTHON = {
    "README.md": "test_examples.py",
    "docs/adapters.md": "test_lines_of_a_page_run, after its commands",
    "docs/format.md": "test_examples.py",
    "docs/quickstart.md": "test_examples.py",
    "docs/serve.md": "test_serving.py",
    **{f"docs/adding-a-{name}.md": "test_adding.py" for name in ("method", "format", "backend")},
    "docs/adding-a-model.md": "test_adding.py",
    "docs/several-cards.md": "test_several_cards.py",
    "docs/vllm.md": "tests/unit/integrations/vllm/test_engine.py, where vLLM is installed",
}
"""Pages with blocks of Python, and what runs these."""
DATA = "it downloads data; tests/evaluation_tasks runs such commands on data of its own"
ADDED = "it needs what the page adds, which is there in the process of test_adding.py alone"
CARD = "it needs a card; tests marked gpu run it"
CARDS = "it needs two cards; tests/unit/timing/test_several_cards.py does on CPUs what it does"
WORKERS = "it starts workers; tests/unit/pipeline/test_shared_work.py does what it does"
CLUSTER = "tests/cli/test_preflight.py runs such a command"
GRID = "tests/cli/test_grid.py runs such commands"
LONG = "the tiny model has too few positions; tests/cli/test_end_to_end.py runs such a command"
SWEEP = "it makes eight checkpoints; tests/cli/test_mixed_precision.py runs a smaller one"
SAME = "docs/evaluation.md has such a line, which runs"
PEER = "it needs llama.cpp; tests/unit/timing/test_cpu.py runs one that isn't real"
SERVER = "it ends by a signal; test_serving.py runs it"
TYPED = "the tiny model has no chat template; tests/cli/test_chat.py runs such a command"
BLANKS = (
    "the tiny model's tokenizer cuts at blanks; tests/unit/exchange/test_gguf_writing.py exports"
)
NOT_RUN = {
    "docs/gguf.md: export": BLANKS,
    "docs/cpu.md: bench OUT_DIR --gguf": PEER,
    "docs/serve.md: serve OUT_DIR": SERVER,
    "docs/adapters.md: serve OUT_DIR --adapter": SERVER,
    "docs/serve.md: chat OUT_DIR": TYPED,
    "docs/adding-a-model.md: eval OUT_DIR --baseline MODEL": SAME,
    "docs/results.md: eval smollm2-w4 --baseline demo:smollm2 --windows": SAME,
    "README.md: eval smollm2-w3 --tasks": DATA,
    "docs/adding-a-backend.md: eval OUT_DIR --backend exact": ADDED,
    "docs/adding-a-method.md: quantize --method rtn_clip": ADDED,
    "docs/adding-a-method.md: eval smollm2-clip": ADDED,
    "docs/adding-a-recipe.md: quantize --recipe bcq-w2g32 ": ADDED,
    "docs/comparing.md: compare demo:smollm2 smollm2-rtn-w4": DATA,
    "docs/evaluation.md: eval OUT_DIR --tasks mmlu,arc_easy": DATA,
    "docs/evaluation.md: eval OUT_DIR --tasks humaneval": DATA,
    "docs/evaluation.md: eval OUT_DIR --tasks mmlu,gsm8k": DATA,
    "docs/evaluation.md: eval OUT_DIR --tasks mmlu,humaneval": DATA,
    "docs/mixed-precision.md: quantize --recipe bcq-w3g64-coded --sweep": SWEEP,
    "docs/results.md: eval smollm2-w4 --baseline demo:smollm2 --tasks": DATA,
    "docs/results.md: bench --synthetic": CARD,
    "docs/teacher-intervention.md: train MODEL texts.jsonl": "docs/training.md has it, and it runs",
    "docs/several-cards.md: bench ": CARDS,
    "docs/several-machines.md: quantize ": WORKERS,
    "docs/several-machines.md: run mine.yaml MODEL --dry-run=cluster ": CLUSTER,
    "docs/several-machines.md: grid ": GRID,
    "docs/several-machines.md: compare ": GRID,
    "docs/results.md: bench build/demo": LONG,
}
"""Why, by how a line of a page begins."""
PLANNED = {
    "README.md: quantize ": "test_examples.py, in the quickstart",
    "docs/mixed-precision.md: quantize --average-bits 3.25": "tests/cli/test_mixed_precision.py",
    "docs/tuning.md: quantize --recipe bcq-w3g64-coded --tune blocks": "the line below, which runs",
    "docs/mixed-precision.md: quantize --average-bits 4.25": "tests/cli/test_mixed_precision.py",
    "docs/results.md: quantize ": "docs/tuning.md and docs/folding.md, whose lines run",
    "docs/which-recipe.md: quantize ": "docs/tuning.md, whose lines run",
}
"""Lines that end with `--dry-run` here, since they take long, and what else runs such a command."""
OTHER_PROGRAMS = {
    "make ": "make itself runs these tests",
    "pip install ": "it installs the environment of these tests",
    "python3 -m venv ": "it installs the environment of these tests",
    ".venv/bin/pip install ": "it installs the environment of these tests",
    "source ": "it is for a terminal",
    ".venv/bin/python -m pytest ": "test_adding.py runs it",
    "curl ": "test_serving.py sends the request",
    "ray start ": "tests/ray_cluster.py starts nodes likewise, where Ray is installed",
    "torchrun ": "test_several_cards.py runs a script so, and a server on its decoders",
    "vllm serve ": "it needs vLLM; tests/unit/integrations/vllm runs its engine where it is",
}
MODELS = {"MODEL", "ORIGINAL", "demo:smollm2"}
CHECKPOINT = re.compile(r"OUT_DIR|W\d_DIR|smollm2-[\w-]+")
FEW = (
    "num_samples=8",
    "sequence_length=32",
    "holdout=0.25",
    "dataset=wikitext2-valid",
    "mixture=null",
)
LESS = {
    "--tune blocks": ("tuning.blocks.steps=2",),
    "--tune both": ("tuning.blocks.steps=2", "tuning.end_to_end.steps=2"),
    "search={}": ("search.clip_ratios=[1.0,0.9]", "search.roundings=[0]"),
    "sparse-70": ("weights.options.memory=8",),
    "w3-q-rater": ("search.clip_ratios=[1.0,0.9]", "search.roundings=[0]"),
}
"""Settings by what a command has in it."""
WORDS = "".join(f'{{"text": "w{n} w{n + 1} w{n + 2}"}}\n' for n in range(3, 20))
"""Texts in the words that the tiny model knows."""
RUN_HERE = [
    page
    for page in CURRENT
    if str(page.relative_to(ROOT)) not in ELSEWHERE and list(command_lines(page))
]


def key(line: Line) -> str:
    """Return page and words of a line without the program, as the tables have it."""
    return f"{line.page}: {' '.join(line.words[1:])}"


def begins_with(text: str, table: dict[str, str]) -> bool:
    return any(text.startswith(start) for start in table)


def small(line: Line, model: Path) -> list[str]:
    """Return the command for a tiny model, with less to do."""
    command, *rest = [str(model) if word in MODELS else word for word in line.words[1:]]
    text = key(line)
    if command in ("eval", "compare") and "--pairs" not in rest:
        return [command, *rest, "--context-length", "32", "--no-chats"]
    if command != "quantize":
        return [command, *rest]
    settings = [value for words, values in LESS.items() if words in text for value in values]
    if "--method rtn" not in text or "calibration." in text:
        settings += [f"calibration.{value}" for value in FEW]
    planned = ["--dry-run"] if begins_with(text, PLANNED) and "--dry-run" not in rest else []
    added = [word for setting in settings for word in ("--set", setting)]
    return [command, *rest, *added, *planned]


@pytest.mark.parametrize("page", RUN_HERE, ids=lambda page: page.stem)
def test_lines_of_a_page_run(cli: Cli, page, chat_llama, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page.stem == "recipes":
        Path("mine.yaml").write_text(blocks(page, "yaml")[0], encoding="utf-8")
    if page.stem == "adapters":
        Path("chats.jsonl").write_text(blocks(page, "json")[0], encoding="utf-8")
    if page.stem in ("training", "flexor", "pnr"):
        Path("texts.jsonl").write_text(WORDS, encoding="utf-8")
    for line in command_lines(page):
        if begins_with(key(line), NOT_RUN):
            continue
        for word in filter(CHECKPOINT.fullmatch, line.words):
            if line.words[1] == "quantize":
                shutil.rmtree(word, ignore_errors=True)
            elif not Path(word).exists():
                shutil.copytree(checkpoint, word)
        done = cli(*small(line, chat_llama))
        assert done.code == 0, f"{line}: {done.err}"
    if page.stem == "adapters":
        exec(blocks(page, "python")[0], {})


def test_lists_of_what_is_not_run_are_up_to_date():
    keys = [key(line) for page in RUN_HERE for line in command_lines(page)]
    unused = [start for start in (*NOT_RUN, *PLANNED) if not any(k.startswith(start) for k in keys)]
    assert unused == []
    assert all((ROOT / "tests" / "docs" / name).is_file() for name in ELSEWHERE.values())


def test_every_other_line_of_a_block_says_why_it_is_not_run():
    texts = [text for page in CURRENT for text in blocks(page, "", "sh", "bash")]
    lines = [line for text in texts for line in text.replace("\\\n", " ").splitlines()]
    others = [line for line in lines if line.strip() and not line.startswith("qtool ")]
    assert [line for line in others if not begins_with(line, OTHER_PROGRAMS)] == []
    assert [s for s in OTHER_PROGRAMS if not any(line.startswith(s) for line in others)] == []


def test_every_page_with_python_is_run_by_a_test():
    pages = {str(page.relative_to(ROOT)) for page in CURRENT if blocks(page, "python")}
    assert pages == PYTHON.keys()
