import pytest

from foam.demo import phrasing


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        (
            "the pump in hall 3 vibrates at 14 mm/s, what now?",
            "What should I do? the vibration of pump-3 is too high.",
        ),
        (
            "motor-4 has reached 96 C and keeps climbing, what should we do?",
            "What should I do? the temperature of motor-4 is too high.",
        ),
        (
            "only 18 l/min flow through pump-9",
            "What should I do? the flow of pump-9 is too low.",
        ),
        (
            "battery-6 state of charge has dropped",
            "What should I do? the battery level of battery-6 is too low.",
        ),
        (
            "it is far too hot in here",
            "What should I do? the temperature of sensor-1 is too high.",
        ),
    ],
)
def test_advice_finds_machine_quantity_and_direction(text, prompt):
    assert phrasing.advice({"text": text}) == prompt


@pytest.mark.parametrize(
    "text",
    ["the pump sings", "pump-3 vibrates at 3 mm/s", "something about the temperature of boiler-2"],
)
def test_advice_refuses_what_it_cannot_read(text):
    with pytest.raises(ValueError, match="the text"):
        phrasing.advice({"text": text})


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("How bad is 62 C on boiler-3 when we warn at 80 and trip at 95?", "80, critical at 95"),
        ("How serious is 62 C at boiler-3? limits 80 and 95", "80, critical at 95"),
        ("Alarm: boiler-3 temperature 62 C, critical at 95, warning at 80", "80, critical at 95"),
    ],
)
def test_severity_finds_both_limits(text, limits):
    prompt = phrasing.severity({"text": text})
    head = "Classify the severity: boiler-3 temperature 62 C, warning at "
    assert prompt == f"{head}{limits}."


def test_the_two_of_co2_is_no_limit():
    text = "Grade this alarm: sensor-5 co2 1200 ppm, warning at 1000, critical at 1500"
    assert phrasing.severity({"text": text}).endswith("warning at 1000, critical at 1500.")


@pytest.mark.parametrize(
    "text", ["pump-7 vibration 14 mm/s", "pump-7 vibrates, warning 7, critical 11"]
)
def test_severity_refuses_missing_numbers(text):
    with pytest.raises(ValueError, match="severity needs"):
        phrasing.severity({"text": text})


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("Turn this reading into JSON: fan-2 reports noise 71 dB", "fan-2 reports noise 71 dB"),
        ("sensor-5 reports co2 1850 ppm, as JSON please", "sensor-5 reports co2 1850 ppm"),
        ("[hall-a] fan-2: vibration=9.3mm/s", "[hall-a] fan-2: vibration=9.3mm/s"),
    ],
)
def test_extraction_keeps_the_sentence(text, prompt):
    assert phrasing.extraction({"text": text}) == f"Extract JSON: {prompt}"


def test_a_request_without_a_reading_is_refused():
    with pytest.raises(ValueError, match="no reading"):
        phrasing.extraction({"text": "as JSON please"})


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("Are these motor-4 values rising: 61 67 74 80?", "Trend of 61 67 74 80?"),
        ("1 2 3 4 5 6 7 8", "Trend of 1 2 3 4 5 6?"),
    ],
)
def test_trend_leaves_the_machine_number_out(text, prompt):
    assert phrasing.trend({"text": text}) == prompt


def test_conversion_and_topic_and_small_talk():
    assert phrasing.conversion({"text": "How many kPa are 5.2 bar?"}) == "Convert 5.2 bar to kPa."
    topic = phrasing.topic({"text": "Which MQTT topic carries the noise of fan-2 at plant-1?"})
    assert topic == "MQTT topic for noise of fan-2 at plant-1?"
    assert phrasing.small_talk({"text": "Hello, what can you do?"}) == "What can you do?"
    with pytest.raises(ValueError, match="only about itself"):
        phrasing.small_talk({"text": "tell me about Rome"})
