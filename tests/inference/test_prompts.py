import csv
import json
from pathlib import Path

import pytest

from opensora.inference.prompts import PromptFile, add_fps, add_motion_score, prompts_from_texts

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "sampling.json").read_text())


def test_suffixes_equal_golden():
    golden = GOLDEN["add_fps_info_to_text"]
    assert [add_fps(text, golden["fps"]) for text in golden["in"]] == golden["out"]
    scores = GOLDEN["add_motion_score_to_text"]
    assert [add_motion_score("a cat. 24 FPS.", "4")] == scores["score '4'"]
    assert [add_motion_score("x", 4)] == scores["score 4"]


def test_a_prompt_of_the_command_line_is_one_prompt():
    text = 'raining, sea; "so be it"\nünïcode 雨'
    (prompt,) = prompts_from_texts(text, "a.png;b.png", "blurry")
    assert prompt.text == text
    assert prompt.references == ("a.png", "b.png")
    assert prompt.negative == "blurry"
    assert prompt.name == "prompt_0000"


def test_a_list_of_prompts_takes_one_reference_each_or_one_for_all():
    prompts = prompts_from_texts(["a", "b"], ["x.png", "y.png;z.png"], "")
    assert [(p.text, p.references) for p in prompts] == [("a", ("x.png",)), ("b", ("y.png", "z.png"))]
    assert [p.references for p in prompts_from_texts(["a", "b"], "x.png", "")] == [("x.png",)] * 2
    with pytest.raises(ValueError, match="1 entries for 2 prompts"):
        prompts_from_texts(["a", "b"], ["x.png"], "")


def test_csv_columns(tmp_path):
    (tmp_path / "beside.png").touch()
    path = tmp_path / "my list.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "ref", "neg", "name"])
        writer.writerow(['a "quoted", line\nbreak', "beside.png;elsewhere.png", "dark", "first"])
        writer.writerow(["second", "", "", ""])
    first, second = PromptFile(path).prompts("default.png", "negative")
    assert first.text == 'a "quoted", line\nbreak'
    assert first.references == (str(tmp_path / "beside.png"), "elsewhere.png")
    assert (first.negative, first.name, first.index) == ("dark", "first", 0)
    assert (second.references, second.negative) == (("default.png",), "negative")
    assert (second.name, second.index) == ("my list_0001", 1)


def test_a_prompt_of_another_encoding_is_named():
    with pytest.raises(ValueError, match=r"prompt 1 \(from 0\) of 2 is not text in UTF-8"):
        prompts_from_texts(["a", b"caf\xe9".decode("utf-8", "surrogateescape")], None, "")


def test_an_empty_prompt_is_named():
    with pytest.raises(ValueError, match=r"prompt 1 \(from 0\) of 3 is empty"):
        prompts_from_texts(["a", " \n", "b"], None, "")


def test_txt_is_one_prompt_a_line(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("\ufeffone, two\n\n  three \n", encoding="utf-8")
    prompts = PromptFile(path).prompts(None, "")
    assert [(p.text, p.name, p.references) for p in prompts] == [("one, two", "p_0000", ()), ("three", "p_0001", ())]


def test_samples_of_a_prompt_are_numbered_if_several(tmp_path):
    (prompt,) = prompts_from_texts("a", None, "")
    assert prompt.file_stem(0, 1) == "prompt_0000"
    assert [prompt.file_stem(k, 2) for k in range(2)] == ["prompt_0000_0", "prompt_0000_1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"path,caption\na,b\n", "needs a column 'text' .*path, caption"),
        ("p.csv", b"", "needs a column 'text'"),
        (
            "p.csv",
            b"text,ref\na,x.png\nraining, sea,y.png\n",
            "row 1 \\(from 0\\) has more fields than the header: put texts",
        ),
        ("p.csv", b"text,ref\na,x.png\n  ,y.png\n", "row 1 \\(from 0\\) has no text"),
        ("p.csv", b"ref,text\nx.png\n", "row 0 \\(from 0\\) has no text"),
        ("p.csv", b"text,name\na,x\nb,x\n", "2 rows are named 'x'"),
        ("p.csv", b"text,name\na,../x\n", "'../x' cannot be a file name"),
        ("p.csv", b"text,name\na," + b"x" * 241 + b"\n", "the name 'x{20}...' has 241 bytes: at most 240"),
        ("p.csv", b"text,name\na,contact_sheet\n", "'contact_sheet' is kept for the contact sheet"),
        ("p.csv", b"text\n\xff\xfe\n", "UTF-8"),
        ("p.txt", b"\xff\xfe\n", "UTF-8"),
        ("p.json", b"[]", "read from .csv or .txt"),
    ],
)
def test_bad_files_are_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        PromptFile(path).prompts(None, "")
    assert "\n" not in str(caught.value)


def test_columns_are_found_with_blanks_around_them_and_others_are_named(tmp_path, said):
    (tmp_path / "p.csv").write_text("text, ref ,style\na,x.png,oil\n")
    (prompt,) = PromptFile(tmp_path / "p.csv").prompts(None, "")
    assert prompt.references == ("x.png",)
    assert [line.split(": ", 1)[1] for line in said] == ["of its columns style are not used, text, ref, neg, name are"]


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        PromptFile(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="there is no prompt"):
        PromptFile()
