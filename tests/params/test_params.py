"""What holds for parameters: one place for defaults, and clear refusals."""

import re
import shutil

import pytest
import yaml
from dvc.utils.hydra import apply_overrides

from pipeline.errors import UserError
from pipeline.params import Params
from pipeline.params.file import load_params, to_yaml
from pipeline.params.page import page
from tests.conftest import ROOT


def test_the_parameter_file_is_written_from_the_schema_and_complete():
    assert (ROOT / "params.yaml").read_text() == to_yaml(Params())


def test_the_written_file_reads_back_as_the_same_parameters(tmp_path):
    changed = load_params(None, ["seed=3", "distill.objective=jsd", "reward.phi_kl=[0.5]", "template='Q: {prompt}'"])
    (tmp_path / "p.yaml").write_text(to_yaml(changed))
    assert load_params(tmp_path / "p.yaml") == changed != Params()


def test_every_parameter_but_the_groups_has_a_description():
    def undocumented(section, path=""):
        for name, field in type(section).model_fields.items():
            value = getattr(section, name)
            if isinstance(value, type(section).__mro__[-3]):
                yield from undocumented(value, f"{path}{name}.")
            elif not field.description:
                yield path + name

    assert list(undocumented(Params())) == []


def test_a_partial_file_is_filled_with_defaults_and_options_win(tmp_path):
    (tmp_path / "p.yaml").write_text("distill: {lam: 0.03, beta: 0.1}\n")
    params = load_params(tmp_path / "p.yaml", ["distill.lam=0.02"])
    assert (params.distill.lam, params.distill.beta) == (0.02, 0.1)
    assert params.reward == Params().reward


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.objectve=fkl", "distill.objectve: unknown parameter; did you mean 'objective'"),
        ("distill.objective=kld", "Input should be 'sft', 'seqkd'"),
        ("generate.k=-1", "generate.k: Input should be greater than or equal to 0, found -1"),
        ("generate.k=0", "support sampled keeps at least one token per position: set k, or support to topk"),
        ("generate.support=top", "'sampled' or 'topk', found 'top'"),
        ("template=no placeholder", "does not contain {prompt}"),
        ("generate.temperature=0", "temperature 0 is greedy"),
        ("teach.student.optimisation.accumulation=5", "cannot be split into 5 equal micro-batches"),
        ("teach.teacher.model.heads=5", "must be an even multiple of heads"),
        ("seed=-1", "greater than or equal to 0, found -1"),
        ("distill.lam=[", "the value is not valid YAML"),
        ("lam", "expected key=value"),
        ("distill.objective=x-skew-fkl", "write skew_fkl with distill.reward=frozen"),
        ("distill.objective=kl", "fkl is KL(teacher || student), rkl is KL(student || teacher)"),
        ("distill.objective=JS", "write jsd"),
        ("distill.objective=ce", "sft learns references"),
        ("distill.objective=distillm", "write skew_fkl or skew_rkl"),
        ("distill.objective=x-kd", "fkl with distill.reward=frozen"),
        ("distill.temperature=1", "unknown parameter; it is distill.on_policy.temperature"),
        ("reward.temperature=1", "unknown parameter; it is generate.temperature or score.temperature or distill.on_po"),
        ("generate.max_tokens=9", "generate.max_tokens: unknown parameter; it is max_tokens"),
        ("distill.learning_rate=1", "unknown parameter; it is distill.optimisation.learning_rate"),
        ("k=3", "k: unknown parameter; it is generate.k"),
        ("prepare.dataset.references={de}", "Input should be a valid list, found {'de': None}"),
        ("prepare.dataset.references=[]", "should have at least 1 item"),
        ('template="{prompt}" =>"', "the value is not valid YAML"),
        ("template={prompt} \0", "half a surrogate pair or a null character"),
        ("seed.x=1", "seed"),
    ],
)
def test_a_slip_is_named_with_what_is_allowed(override, message):
    with pytest.raises(UserError) as error:
        load_params(None, ["seed=1", override])
    assert message in str(error.value)


def test_a_text_needs_no_quotes_of_its_own():
    """YAML reads {en} as a mapping, and 1 as a number: a text is taken as it stands, unless it is quoted."""
    for given, text in (
        ("{en}", "{en}"),
        ("Q: {en}  # not a comment", "Q: {en}  # not a comment"),
        ("[1]", "[1]"),
        ("null", "null"),
        ("", ""),
        ("'{en}'", "{en}"),
        ('"{en}\\n"', "{en}\n"),
        ('"{en}', '"{en}'),
    ):
        assert load_params(None, [f"prepare.dataset.prompt={given}"]).prepare.dataset.prompt == text
    assert load_params(None, ["teach.teacher.base=7", "distill.best="]).teach.teacher.base == "7"


def test_a_text_in_a_file_that_yaml_reads_as_a_mapping_is_named_with_the_way_to_write_it(tmp_path):
    (tmp_path / "p.yaml").write_text("prepare: {dataset: {prompt: {en}}}")
    with pytest.raises(UserError, match=r"prompt: .*found \{'en': None\}; a text that begins with \{ needs quotes"):
        load_params(tmp_path / "p.yaml")


def test_what_the_docs_show_for_dvc_exp_run_sets_texts_and_lists(tmp_path):
    """Hydra, which reads the values of -S, takes no text that begins with a brace without quotes of its own."""
    shown = re.findall(r"`-S \"(.+?)\"`", (ROOT / "docs" / "experiments.md").read_text())
    shutil.copy(ROOT / "params.yaml", tmp_path)
    apply_overrides(tmp_path / "params.yaml", shown)
    found = load_params(tmp_path / "params.yaml").prepare.dataset
    assert (found.prompt, found.references) == ("{en}", ["summary", "summary1"]) and len(shown) == 2


def test_references_are_one_column_or_several():
    for given, columns in (("answer", ["answer"]), ("[a, b]", ["a", "b"])):
        assert load_params(None, [f"prepare.dataset.references={given}"]).prepare.dataset.references == columns


def test_a_reward_without_a_lower_bound_is_refused_with_the_reason():
    """phi trained by the single loss with lam > kl_weight drives sigma to zero (design, section 3)."""
    with pytest.raises(UserError, match=r"\(lam - kl_weight\) \* log sigma"):
        load_params(None, ["distill.reward=scratch", "distill.lam=2"])
    assert load_params(None, ["distill.reward=zero", "distill.lam=2"]).distill.lam == 2
    assert load_params(None, ["distill.reward=scratch", "distill.lam=0.03"]).distill.lam == 0.03


@pytest.mark.parametrize("text", ["a: [", "- just\n- a list\n"])
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path, text):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(UserError, match=r"p\.yaml"):
        load_params(tmp_path / "p.yaml")
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(UserError, match="no parameter file at"):
            load_params(path)


def test_the_smoke_parameters_are_valid():
    smoke = yaml.safe_load((ROOT / "tests" / "smoke.yaml").read_text())
    assert load_params(ROOT / "tests" / "smoke.yaml").prepare.train == smoke["prepare"]["train"]


@pytest.mark.parametrize("name", ["seed", "model", "dtype", "logprobs_mode", "load_format", "max_num_sequences"])
def test_engine_options_are_those_that_change_no_answer(name):
    with pytest.raises(UserError, match=rf"generate.engine_options.{name}.*'max_num_seqs'"):
        load_params(None, [f"generate.engine_options={{{name}: 1}}"])


def test_the_page_of_parameters_is_current_and_has_every_parameter():
    text = (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8")
    assert text == page()
    assert len(re.findall(r"^\| `", text, re.M)) > 100
