"""What a selector of the settings is handed: min and max are the batch's, a rule by itself takes its rows'."""

import pytest

from opsd.build.sampler import build_selector
from opsd.config import SelectConfig
from opsd.selection import load_selector
from opsd.utils.errors import UserError
from tip_patch.selectors import EntropySample


class Own(EntropySample):
    """A rule of the user's own, which has no option but the retention."""

    def __init__(self, retention: float = 0.5) -> None:
        super().__init__(retention)


OWN = f"{__name__}:Own"


@pytest.mark.parametrize("by", ["soft_or", "soft_or_bottom", "q3"])
def test_the_trainer_scales_over_the_batch_and_a_rule_by_itself_over_the_rows_it_is_given(by):
    assert build_selector(SelectConfig(by=by)).normalise_over == "batch"
    assert load_selector(by).normalise_over == "micro_batch"
    for scope in ("micro_batch", "rollout", "running"):
        assert build_selector(SelectConfig(by=by, normalise_over=scope)).normalise_over == scope


def test_a_rule_that_scales_nothing_costs_no_pass_over_the_batch():
    assert build_selector(SelectConfig(by="entropy_sample")).normalise_over == "micro_batch"


def test_an_option_by_name_wins():
    selector = build_selector(SelectConfig(by="soft_or", options={"normalise_over": "rollout", "retention": "0.25"}))
    assert (selector.normalise_over, selector.retention) == ("rollout", 0.25)


def test_a_rule_without_the_option_is_asked_for_it_only_where_the_user_does():
    for scope in ("batch", "micro_batch"):  # the default, and that of earlier run folders
        assert build_selector(SelectConfig(by=OWN, normalise_over=scope)).retention == 0.5
    with pytest.raises(UserError, match="takes no option 'normalise_over'; it takes: retention"):
        build_selector(SelectConfig(by=OWN, normalise_over="rollout"))
