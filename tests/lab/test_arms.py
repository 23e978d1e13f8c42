import pytest

from batchnorm.errors import OptionError
from batchnorm.lab.arms import ARMS, Arm, resolve


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
def test_an_arm_survives_text_and_dict(arm):
    assert Arm.parse(str(arm)) == arm
    assert Arm.from_dict(arm.to_dict()) == arm


def test_bias_is_left_out_only_where_beta_replaces_it():
    assert not ARMS["before"].linear_bias
    assert ARMS["after"].linear_bias  # β of a norm behind the activation can't move what goes into it
    assert ARMS["none"].linear_bias
    assert ARMS["bias"].linear_bias
    assert not Arm("x", bias=False).linear_bias


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("befor", "unknown arm 'befor': choose from none, before, after"),
        ("x: norm=instance", "arm 'x': norm must be one of none, batch, layer, group, got 'instance'"),
        ("x: norm", "an arm is declared as 'name: key=value, key=value', got 'x: norm'"),
        (": norm=batch", "an arm is declared as 'name: key=value, key=value', got ': norm=batch'"),
        ("x: speed=3", "an arm has the keys name, norm, .*, got 'speed'"),
        ("x: batch_size=many", "batch_size of an arm must be a whole number, got 'many'"),
        ("x: batch_size=1", "arm 'x': batch_size must be at least 2, got 1"),
        ("x: bias=perhaps", "bias of an arm must be yes or no, got 'perhaps'"),
    ],
)
def test_a_wrong_arm_is_named_with_the_choices(text, message):
    with pytest.raises(OptionError, match=message):
        resolve([text])


def test_arms_need_names_of_their_own():
    with pytest.raises(OptionError, match="every arm needs a name of its own, got before, before"):
        resolve(["before", "before"])
    with pytest.raises(OptionError, match="at least one arm"):
        resolve([])
