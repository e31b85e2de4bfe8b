"""What holds for prompts as models read them: those that read the same are asked about once, and never held out."""

from pipeline.models import load_tokenizer
from pipeline.prompts import Prompt, PromptFormat
from pipeline.teacher.items import read_as_models_do


def read(teacher, **splits: list[str]) -> tuple[dict[str, list[str]], int]:
    """The texts that are kept of each split, and how many were left out."""
    prompts = [Prompt(text, text, (), split) for split, texts in splits.items() for text in texts]
    kept, left_out = read_as_models_do(prompts, PromptFormat("{prompt}"), load_tokenizer(teacher))
    return {split: [each.text for each in kept if each.prompt.split == split] for split in splits}, left_out


def test_prompts_for_the_student_that_read_as_training_or_held_out_ones_are_left_out(teacher, capsys):
    """Words that the tokenizer does not know are one token, so that these prompts read the same."""
    others = {"train": ["w1 aaa", "w2"], "validation": ["w3 aaa"], "test": ["w4 aaa"]}
    kept, left_out = read(teacher, **others, student=["w1 bbb", "w3 bbb", "w4 bbb", "w5 bbb", "w6"])
    assert kept == others | {"student": ["w5 bbb", "w6"]} and left_out == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "3 prompts of the split student have the token ids of training or held-out prompts" in said
    assert "training prompts have" not in said


def test_what_is_left_out_of_training_and_of_the_students_prompts_is_said_apart(teacher, capsys):
    given = {"train": ["w1 aaa", "w2"], "test": ["w1 bbb"], "student": ["w1 ccc", "w3"]}
    kept, left_out = read(teacher, **given)
    assert kept == {"train": ["w2"], "test": ["w1 bbb"], "student": ["w3"]} and left_out == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "1 training prompts have the token ids of held-out prompts" in said
    assert "1 prompts of the split student have" in said


def test_prompts_for_the_student_take_nothing_from_the_other_splits(teacher, capsys):
    given = {"train": ["w1"], "validation": ["w2"], "test": ["w3"]}
    assert read(teacher, **given, student=["w4"])[0] == given | {"student": ["w4"]}
    assert not capsys.readouterr().err
