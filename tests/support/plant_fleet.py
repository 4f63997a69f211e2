"""A small plant fleet with requests that it serves and requests that nobody there can serve.

Small fleets are the hard case for a fitted threshold: few examples, hence little to fit.
"""

from typing import Final, NamedTuple


class Function(NamedTuple):
    """What a node advertises."""

    name: str
    description: str
    examples: tuple[str, ...]


FUNCTIONS: Final = [
    Function(
        "vibration_spectrum",
        "Computes spectrum and band energy of a vibration signal and names the strongest peaks.",
        (
            "compute the vibration spectrum of this signal",
            "which frequencies dominate the bearing vibration",
            "band energy of the accelerometer samples between 10 and 500 Hz",
            "FFT of these vibration samples",
        ),
    ),
    Function(
        "anomaly_score",
        "Scores how unusual the newest sensor readings are compared with their history.",
        (
            "is this temperature reading unusual",
            "anomaly score for these pressure values",
            "does the current draw of motor 2 look abnormal",
            "how strange is this last sample",
        ),
    ),
    Function(
        "trend_forecast",
        "Forecasts the next values of a slowly changing measurement and when it crosses a limit.",
        (
            "forecast the tank level for the next hours",
            "when will the bearing temperature reach 90 degrees",
            "predict the next ten values of this series",
        ),
    ),
    Function(
        "alert_triage",
        "Reads an alert from a machine and decides its severity and urgency.",
        (
            "how severe is this alert: pump 7 overheating",
            "classify this alarm message",
            "triage: compressor pressure low in hall 3",
            "is this warning critical or can it wait",
        ),
    ),
    Function(
        "extract_json",
        "Extracts the fields of a free text sensor reading as JSON.",
        (
            "extract the values as JSON: pump 7 reads 81 C and 3.2 bar",
            "turn this reading into JSON",
            "parse the fields from: tank 4 level 63 percent at 09:10",
        ),
    ),
    Function(
        "summarise",
        "Summarises a log or a list of events in one or two sentences.",
        (
            "summarise this shift log",
            "short summary of the last events",
            "give me the gist of these messages",
        ),
    ),
    Function(
        "advise_action",
        "Advises a maintenance worker what to do next about a described fault.",
        (
            "what should I do about the high vibration of pump 7",
            "the pump in hall 3 vibrates at 14 mm/s, what now?",
            "motor 2 runs hot, what action do you recommend",
            "the valve is leaking, next step?",
        ),
    ),
    Function(
        "manual_lookup",
        "Finds the passage of the maintenance manual that answers a question.",
        (
            "how often must the bearings be greased",
            "what torque for the coupling bolts",
            "which oil does the gearbox need",
            "manual: how to replace the mechanical seal",
        ),
    ),
    Function(
        "convert_units",
        "Converts a measured value to another unit.",
        (
            "convert 14 mm/s to inch per second",
            "how much is 3.2 bar in psi",
            "81 degrees Celsius in Fahrenheit",
        ),
    ),
    Function(
        "statistics",
        "Mean, standard deviation and percentiles of a list of numbers.",
        (
            "average of these readings",
            "standard deviation of the last samples",
            "what is the 95th percentile of these values",
        ),
    ),
]

IN_SCOPE: Final = [
    ("analyse the frequency content of the pump vibration", "vibration_spectrum"),
    ("show me the peaks in the spectrum of this accelerometer signal", "vibration_spectrum"),
    ("do an fft of the motor signal", "vibration_spectrum"),
    ("are these readings abnormal?", "anomaly_score"),
    ("check whether the pressure looks weird compared to normal", "anomaly_score"),
    ("detect outliers in the sensor data", "anomaly_score"),
    ("how will the temperature develop over the next hours", "trend_forecast"),
    ("predict when the tank will be empty", "trend_forecast"),
    ("extrapolate this series", "trend_forecast"),
    ("how urgent is this alarm: oil pressure low on compressor 2", "alert_triage"),
    ("rate the severity of: motor 4 over temperature", "alert_triage"),
    ("prioritise this alert", "alert_triage"),
    ("get the numbers out of this text as json: boiler 2 at 143 C, 6.1 bar", "extract_json"),
    ("convert this message to structured data: valve 3 open 40 percent", "extract_json"),
    ("write a brief summary of today's log", "summarise"),
    ("sum up what happened last night in the plant", "summarise"),
    ("pump 9 is making noise, what should we do?", "advise_action"),
    ("the bearing of fan 3 is at 95 C, what now", "advise_action"),
    ("recommend a fix for the leaking seal", "advise_action"),
    ("what lubricant should be used for the gearbox", "manual_lookup"),
    ("how do I change the seal of the pump", "manual_lookup"),
    ("tightening torque of the coupling", "manual_lookup"),
    ("maintenance interval for bearings", "manual_lookup"),
    ("how many psi is 6 bar", "convert_units"),
    ("100 F in Celsius please", "convert_units"),
    ("what's the mean of these samples", "statistics"),
    ("compute the median and spread of the values", "statistics"),
]
"""Paraphrases, each with the function that should serve it."""

OUT_OF_SCOPE: Final = [
    "write me a poem about the sea",
    "book a flight to Paris",
    "asdf qwer",
    "what is the capital of France",
    "order a pizza with mushrooms",
    "tell me a joke",
    "who won the football world cup",
    "translate good morning into Spanish",
    "play some jazz music",
    "recommend a good movie for tonight",
    "how do I bake sourdough bread",
    "what should I wear to the wedding",
    "buy 100 shares of the company",
    "lorem ipsum dolor sit amet",
    "hello",
    "send an email to my boss",
    "set an alarm for seven",
    "turn on the kitchen light",
    "what is the meaning of life",
    "explain quantum entanglement",
    "draw a picture of a cat",
    "find a hotel in Berlin near the station",
    "how tall is mount everest",
    "write a python function that sorts a list",
    "what is the weather in London tomorrow",
    "zzz",
    "12345",
    "give me dating advice",
    "summon a taxi",
    "what is love",
]
