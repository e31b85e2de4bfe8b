"""What holds for parameters: one place for defaults, and clear refusals."""

import pytest
import yaml

from pipeline.errors import UserError
from pipeline.params import Params
from pipeline.params_file import load_params, to_yaml
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
        ("distill.objective=kld", "'skew_rkl' or 'tvd', found 'kld'"),
        ("generate.k=0", "generate.k: Input should be greater than 0, found 0"),
        ("template=no placeholder", "does not contain {prompt}"),
        ("generate.temperature=0", "temperature 0 is greedy"),
        ("teach.student.optimisation.accumulation=5", "cannot be split into 5 equal micro-batches"),
        ("teach.teacher.model.heads=5", "must be an even multiple of heads"),
        ("seed=-1", "greater than or equal to 0, found -1"),
        ("distill.lam=[", "the value is not valid YAML"),
        ("lam", "expected key=value"),
        ("seed.x=1", "seed"),
    ],
)
def test_a_slip_is_named_with_what_is_allowed(override, message):
    with pytest.raises(UserError) as error:
        load_params(None, ["seed=1", override])
    assert message in str(error.value)


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
