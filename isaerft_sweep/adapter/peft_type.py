"""Adds ISAERFT to PEFT's fixed list of methods.

``peft.register_peft_method`` refuses every name that is not a member of the ``PeftType`` enum, and PEFT has no public
way to add one (seen with peft 0.21.2). ``PeftType`` is a ``str`` enum, so a member is a string with a name.
"""

from __future__ import annotations

import copyreg
from typing import Any

from peft.utils import PeftType, register_peft_method

NAME = "ISAERFT"


def _add_member() -> None:
    member = str.__new__(PeftType, NAME)
    member._name_, member._value_ = NAME, NAME
    type.__setattr__(PeftType, NAME, member)  # EnumType.__setattr__ would refuse it
    PeftType._member_map_[NAME] = member
    PeftType._member_names_.append(NAME)
    PeftType._value2member_map_[NAME] = member
    copyreg.pickle(PeftType, _reduced)


def own_member() -> Any:
    """The member. Unpickling it imports this module's package, which adds the member first."""
    return PeftType[NAME]


def _reduced(member: Any) -> Any:
    return (own_member, ()) if member.value == NAME else (PeftType, (member.value,))


def register(config_class: Any, model_class: Any) -> None:
    """Register ISAERFT with ``get_peft_model`` and ``PeftModel.from_pretrained``. Safe to call again."""
    if NAME not in PeftType.__members__:
        _add_member()
        register_peft_method(name=NAME.lower(), config_cls=config_class, model_cls=model_class)
