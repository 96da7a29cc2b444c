"""Every rollout of a step: the file, its resume, and the page."""

import html
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import TINY, group_of, lucky
from pyarrow import parquet

import grpo
from commands import compare_runs, rollouts
from grpo import GRPOConfig
from npo import replace_slot
from plumbing.command import stored_config
from plumbing.encode import load_tokenizer
from plumbing.record import drop_rollouts_after, rollout_rows, rollouts_path, write_rollouts
from plumbing.rollout import Completion
from worlds import cards

CONFIG = TINY | {"lr": 1e-4}


def asked_of(accuracies: list[float], prompt_id: str = "p"):
    group = group_of(accuracies, prompt_id)
    messages = [{"role": "user", "content": [{"type": "text", "text": "How many?"}]}]
    group.prompt = replace(group.prompt, messages=messages)
    return group


def test_a_row_for_each_trained_slot_and_for_the_discarded_one():
    asked = asked_of([0.0, 0.0, 0.0])
    guide = Completion("p", [9], [-0.5], "so", True, "guide@40", accuracy=1.0, reward=1.0)
    mixed = replace_slot(asked, guide)
    for place, completion in enumerate(mixed.completions):
        completion.advantage, completion.ratios = place - 1.5, [1.0 + place]
    rows = rollout_rows(7, [asked], [mixed])
    assert [(r["slot"], r["trained"], r["source"]) for r in rows] == [
        (0, True, "policy"),
        (1, True, "policy"),
        (2, True, "guide@40"),
        (2, False, "policy"),
    ]
    assert [r["advantage"] for r in rows] == [-1.5, -0.5, 0.5, None]
    assert [r["ratios"] for r in rows] == [[1.0], [2.0], [3.0], None]
    worst = replace(mixed, completions=[*asked.completions[1:], guide])  # took the first slot
    rows = rollout_rows(7, [asked, asked], [mixed, worst])
    assert [(r["group"], r["slot"], r["trained"]) for r in rows[4:]] == [
        (1, 1, True),
        (1, 2, True),
        (1, 0, True),
        (1, 0, False),
    ]
    assert {r["step"] for r in rows} == {7} and list(rows[0])[:5] == [
        "step",
        "prompt",
        "completion",
        "reward",
        "advantage",
    ]


def test_a_file_a_step_cut_on_resume_and_beside_what_was_rolled_back(tmp_path):
    for step, rollbacks in ((3, 0), (12, 0), (3, 1), (5, 1)):
        write_rollouts(rollouts_path(tmp_path, step, rollbacks), [{"step": step}])
    (tmp_path / "rollouts/step_000004.parquet.tmp").touch()
    (tmp_path / "rollouts/mine.parquet").touch()
    drop_rollouts_after(tmp_path, (1, 4))
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == [
        "mine.parquet",
        "step_000003.parquet",
        "step_000003_rollback1.parquet",
        "step_000012.parquet",
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("verifier.is_correct", lucky)
        for steps in (3, 4):
            config = GRPOConfig(out=str(out), steps=steps, rollouts=1, **CONFIG)
            grpo.train(config, str(out))
    return out


def test_a_run_writes_as_many_prompts_as_asked(run):
    files = sorted((run / "rollouts").iterdir())
    assert [path.name for path in files] == [f"step_00000{n}.parquet" for n in (1, 2, 3, 4)]
    rows = parquet.read_table(files[3]).to_pylist()
    assert len(rows) == 4 and len({row["prompt_id"] for row in rows}) == 1
    for row in rows:
        assert len(row["token_ids"]) == len(row["logprobs"])
        assert row["ratios"] is None or len(row["ratios"]) == len(row["token_ids"])
    assert sum(row["advantage"] for row in rows) == pytest.approx(0, abs=1e-5)


def test_the_page_shows_all_of_it_and_runs_nothing(run, capsys):
    rollouts.main(run, 2)
    page = (run / "rollouts/step_000002.html").read_text()
    assert capsys.readouterr().out.strip().endswith("step_000002.html")
    assert page.count("<section") == 4 and page.count("data:image/png;base64,") == 1
    assert "http" not in page and "<script" not in page and "width=device-width" in page
    with pytest.raises(SystemExit, match="no rollouts of step 9 .there are step_000001 to step_"):
        rollouts.main(run, 9)
    with pytest.raises(SystemExit, match="no rollouts of step 1"):
        rollouts.main(run / "checkpoints", 1)


def test_what_a_model_says_is_text():
    tokenizer, evil = load_tokenizer(cards.BASE), "<script>alert(1)</script>"
    ids = tokenizer("27 +8= 35").input_ids
    group = asked_of([1.0, 0.0], evil)
    row = rollout_rows(1, [group], [group])[0]
    row |= {"token_ids": ids, "logprobs": [-0.5] * len(ids), "advantage": 0.7, "prompt": evil}
    row |= {"group": 3, "source": evil, "gold": evil, "ratios": [0.5, *[1.0] * (len(ids) - 1)]}
    prompt = replace(group_of([0.0]).prompt, id=evil)
    page = rollouts.page([row], {evil: prompt}, tokenizer, evil)
    assert "<script" not in page and html.escape(evil) in page
    shown = re.findall(r'<span title="([^"]*)"[^>]*>([^<]*)</span>', page)
    assert "".join(html.unescape(text) for _, text in shown) == "27 +8= 35"
    assert shown[0][0] == "log-prob -0.500, ratio 0.500"


LOOK = """
import json, os, sys
os.environ["QT_QPA_PLATFORM"] = "offscreen"
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--no-sandbox --disable-gpu"
from PyQt6.QtCore import QUrl
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication
app, view = QApplication(sys.argv[:1]), None
view = QWebEngineView()
view.resize(375, 700)
def told(found):
    print(found)
    app.quit()
SEEN = "JSON.stringify([document.title, document.querySelectorAll('section').length, "
SEEN += "document.images[0].naturalWidth, document.documentElement.scrollWidth, "
SEEN += "document.scripts.length, document.querySelector('span').title])"
view.loadFinished.connect(lambda _: view.page().runJavaScript(SEEN, told))
view.load(QUrl.fromLocalFile(sys.argv[1]))
view.show()
app.exec()
"""


def test_a_browser_on_a_phone_shows_it(run):
    """Its width is 375 points; nothing is wider, and the title is text."""
    pytest.importorskip("PyQt6.QtWebEngineWidgets", reason="pip install PyQt6-WebEngine")
    path = rollouts_path(run, 2)
    rows = parquet.read_table(path).to_pylist()
    rows[0]["prompt"] = "<script>document.title = 'stolen'</script>" + "wide" * 200
    prompts = rollouts.prompts_of(stored_config(run), {row["prompt_id"] for row in rows})
    page = rollouts.page(rows, prompts, load_tokenizer(cards.BASE), "<b>step</b> 2")
    (run / "evil.html").write_text(page)
    done = subprocess.run(
        [sys.executable, "-c", LOOK, run / "evil.html"], capture_output=True, text=True, timeout=120
    )
    title, sections, picture, width, scripts, hover = json.loads(done.stdout)
    assert (title, sections, scripts) == ("<b>step</b> 2", 4, 0)
    assert width <= 375 and picture > 100 and hover.startswith("log-prob ")


def lines_of(out, values: dict[int, float], **config) -> None:
    out.mkdir()
    flags = {"prompts_per_step": 2, "seed": 1, "out": str(out)} | config
    (out / "config.json").write_text(json.dumps(flags))
    lines = [{"step": step, "eval/accuracy": value} for step, value in values.items()]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_runs_that_differ_in_the_seed_alone_are_one_curve(tmp_path, capsys):
    lines_of(tmp_path / "a", {0: 0.1, 10: 0.4}, lr=1e-4)
    lines_of(tmp_path / "b", {0: 0.1, 10: 0.6}, lr=1e-4, seed=2)
    lines_of(tmp_path / "c", {0: 0.1, 10: 0.3}, lr=1e-3)
    compare_runs.main([tmp_path / name for name in "abc"], to=tmp_path / "picture.png")
    table = capsys.readouterr().out
    assert re.search(r"^a, b +0\.0001 +0\.5 ± 1\.3 \(step 10\)", table, re.M)  # t of 1 degree
    assert re.search(r"^c +0\.001 +0\.3 \(step 10\)", table, re.M)
    assert (tmp_path / "picture.png").stat().st_size > 5_000
    (tmp_path / "c/code.diff").write_text("commit 1")
    (tmp_path / "b/code.diff").write_text("commit 2")
    compare_runs.main([tmp_path / name for name in "ab"], to=tmp_path / "picture")
    assert re.search(r"runs +code +last .*\na +- .*\nb +\w+ ", capsys.readouterr().out)
    with pytest.raises(SystemExit, match="nothing is logged as 'acc'; it logs eval/accuracy"):
        compare_runs.main([tmp_path / "a"], metric="acc")
    with pytest.raises(SystemExit, match="holds no run"):
        compare_runs.main([tmp_path])
    lines_of(tmp_path / "d", {5: 0.1}, lr=1e-4, seed=3)
    with pytest.raises(SystemExit, match="a, .*d: eval/accuracy at no step of all of them"):
        compare_runs.main([tmp_path / "a", tmp_path / "d"])
    with pytest.raises(SystemExit, match="nowhere"):
        compare_runs.main([tmp_path / "a"], to=tmp_path / "nowhere/x.png")
