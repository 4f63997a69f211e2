from router.patience import ReportPatience


def test_it_waits_the_base_before_anything_is_known() -> None:
    assert ReportPatience(base_ms=1_000).timeout_ms == 1_000


def test_late_answers_make_it_patient_and_quick_ones_less() -> None:
    patience = ReportPatience(base_ms=1_000)
    for _ in range(50):
        patience.answered(2_000)
    assert 2_990 < patience.timeout_ms < 3_300
    for _ in range(200):
        patience.answered(2)
    assert patience.timeout_ms < 1_020


def test_a_missed_answer_doubles_it_until_the_next_answer_and_not_for_ever() -> None:
    patience = ReportPatience(base_ms=1_000)
    patience.missed()
    assert patience.timeout_ms == 2_000
    for _ in range(20):
        patience.missed()
    assert patience.timeout_ms == 15_000
    patience.answered(0)
    assert patience.timeout_ms == 1_000
