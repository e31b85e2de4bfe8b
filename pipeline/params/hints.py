"""What to write instead of names that papers, other tools and our own tables use."""

import re
from typing import get_args

from pipeline.params.student import Distill

_KNOWN = get_args(Distill.model_fields["objective"].annotation)
_OBJECTIVES = {
    "(forward|reverse)?_?kld?|kd": "fkl is KL(teacher || student), rkl is KL(student || teacher)",
    "jsd?": "write jsd",
    "ce|nll|hard": "sft learns references, seqkd the teacher's samples",
    "gkd": "on-policy GKD is not there yet; its divergence on the teacher's samples is jsd with distill.beta",
    "minillm": "on-policy MiniLLM is not there yet; its divergence on the teacher's samples is rkl",
    "distillm": "write skew_fkl or skew_rkl",
    "avril|x_?kd": "write fkl with distill.reward=frozen, or with scratch for the one-stage form",
    f"x_(?P<name>{'|'.join(_KNOWN)})": "write {name} with distill.reward=frozen",
}


def hint_for(key: str, value: object) -> str:
    """What to write instead of a value that a parameter does not take; empty where we do not know."""
    if key == "distill.objective" and isinstance(value, str):
        for pattern, hint in _OBJECTIVES.items():
            if match := re.fullmatch(pattern, value.lower().replace("-", "_")):
                return hint.format(**match.groupdict())
    return ""
