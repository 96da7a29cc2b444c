"""Prompts from data files, through `datasets` itself."""

import datasets
import pytest
from PIL import Image

import tasks
from tasks import UsageError, load_prompts


@pytest.fixture(scope="module")
def geometry(tmp_path_factory):
    """A parquet file in geometry3k's schema: one image, two images, none."""
    path = tmp_path_factory.mktemp("data") / "geometry.parquet"
    red, blue = Image.new("RGB", (40, 36), "red"), Image.new("RGBA", (64, 64), "blue")
    rows = {
        "images": [[red], [red, blue], [], [blue], [red]],
        "problem": [
            "<image>Find x.",
            "From <image> and <image>, find y.",
            "What is 2 + 3?",
            "No mark: find z.",
            "<image> Last.",
        ],
        "answer": ["3", "4", "5", "6", "7"],
    }
    features = datasets.Features(
        {"images": datasets.List(datasets.Image()), "problem": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return str(path)


def test_images_stand_where_the_text_mentions_them(geometry):
    train, held_out = load_prompts(geometry, eval_prompts=1)
    assert (len(train), len(held_out)) == (4, 1)
    shapes = [[part.get("text", "<image>") for part in train[row].messages[0]["content"][:-1]] for row in range(4)]
    assert shapes == [
        ["<image>", "Find x."],
        ["From", "<image>", "and", "<image>", ", find y."],
        ["What is 2 + 3?"],
        ["<image>", "No mark: find z."],
    ]
    assert [len(train[row].images) for row in range(4)] == [1, 2, 0, 1]
    assert train[1].images[1].mode == "RGB"
    assert train[0].messages[0]["content"][-1]["text"].endswith("\\boxed{}.")
    assert (train[3].gold, held_out[0].gold) == ("6", "7")


def test_ids_are_stable_and_name_the_data(geometry):
    one, two = load_prompts(geometry, eval_prompts=1)[0], load_prompts(geometry, eval_prompts=1)[0]
    assert one[2].id == two[2].id == f"{one.fingerprint}:2"
    assert one.fingerprint != load_prompts(geometry, eval_prompts=2)[0].fingerprint


def test_columns_map_and_choices(tmp_path):
    path = tmp_path / "choice.jsonl"
    path.write_text('{"q": "Which?", "options": ["red", "blue"], "key": "B"}\n' * 3)
    train, _ = load_prompts(str(path), columns="prompt=q,answer=key,choices=options", eval_prompts=1)
    assert (train[0].gold, train[0].choices, train[0].images) == ("B", ["red", "blue"], [])


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("{geometry}", {"columns": "prompt=question"}, "no column 'question' for prompt; it has images, problem, answer"),
        ("{geometry}", {"columns": "images=pictures"}, "no column 'pictures' for images"),
        ("{geometry}", {"columns": "picture=images"}, "unknown picture; known are prompt"),
        ("{geometry}", {"eval_prompts": 5}, "would hold out all of them"),
        ("{geometry}x.txt", {}, "cannot be loaded"),
        ("nobody/nothing", {}, "--dataset nobody/nothing"),
        (__file__, {}, "cannot read .py files"),
    ],
)
def test_bad_data_sets(geometry, dataset, options, message):
    with pytest.raises(UsageError, match=message):
        load_prompts(dataset.format(geometry=geometry), **{"eval_prompts": 1} | options)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ('{"problem": null, "answer": "1"}', ""),
        ('{"problem": "?", "images": ["a.png"], "answer": "1"}', ""),
        ('{"problem": "?", "options": "red, blue", "answer": "A"}', "choices=options"),
    ],
)
def test_columns_of_the_wrong_type(tmp_path, row, columns):
    path = tmp_path / "odd.jsonl"
    path.write_text(f"{row}\n" * 2)
    with pytest.raises(UsageError, match="is not usable as"):
        load_prompts(str(path), columns=columns, eval_prompts=1)[0][0]


def test_text_with_more_marks_than_images(tmp_path):
    path = tmp_path / "marks.jsonl"
    path.write_text('{"problem": "<image><image>?", "answer": "1"}\n' * 2)
    with pytest.raises(UsageError, match="mentions 2 images but holds 0"):
        load_prompts(str(path), eval_prompts=1)[0][0]


def test_cards_are_prompts():
    train, held_out = load_prompts("cards", eval_prompts=10)
    assert (len(train), len(held_out)) == (2048, 10)
    assert train.fingerprint != held_out.fingerprint
    prompt = train[5]
    assert isinstance(prompt, tasks.Prompt) and prompt.gold == str(train.rows[5].total)
    assert prompt.images[0].size == (32 * len(train.rows[5].digits), 32)
