"""How people word requests about readings, and what the model says of itself."""

from typing import Final

from foam.models.training.frames import Phrasings

__all__ = [
    "ADVISE",
    "CONVERT",
    "EXTRACT",
    "PROBLEM",
    "READING",
    "SEVERITY",
    "SUMMARISE",
    "TALK",
    "TOPIC",
    "TREND",
]

SEVERITY: Final = Phrasings(
    seen=(
        (
            "Classify the [severity|alert|alarm|alert level]: {d} {m} {v} {u}, warning at {w}, "
            "critical at {c}."
        ),
        "What is the severity? {d} reports {m} {v} {u} (warning {w}, critical {c})",
        "Severity of {m} {v} {u} on {d} with limits {w} and {c}?",
        (
            "How [serious|severe|bad] is this [alert|alarm|reading]: {d} {m} {v} {u}, warning "
            "at {w}, critical at {c}?"
        ),
        "Is {m} [of |]{v} {u} on {d} ok, a warning or critical with limits {w} and {c}?",
        "Rate the severity: {d} {m} {v} {u}, we warn at {w} and trip at {c}.",
        "Grade this [alarm|alert|reading]: {d} {m} {v} {u}, warning from {w}, critical from {c}.",
        (
            "{d} [shows|has] {m} {v} {u}. Warning limit {w}, critical limit {c}. How "
            "[bad|severe] is it?"
        ),
        "The {m} of {d} is {v} {u}; we warn at {w} and stop at {c}. Ok, warning or critical?",
        (
            "With a warning limit of {w} and a critical limit of {c}, how [bad|serious] is {v} {u} "
            "on {d}?"
        ),
        "Limits are {w} (warning) and {c} (critical). {d} reads {v} {u}. Severity?",
        "triage: {d} {m}={v}{u} warn={w} crit={c}",
        "Alert level for {d}: {m} {v} {u} [against|versus] {w} / {c}?",
        "{m} {v} {u} at {d}, thresholds {w} and {c}: which severity?",
        "Tell me the alarm level: {v} {u} {m} on {d}, warn {w}, critical {c}.",
        "Critical is {c} and warning is {w}. What about {v} {u} of {m} at {d}?",
        "How [bad|serious] is {v} {u} [on|at] {d} [when|if] we warn at {w} and trip at {c}?",
        "[Alarm|Alert] on {d}: {m} {v} {u}, warning {w}, critical {c}. [Severity|Level]?",
        "Decide ok, warning or critical: {d} {m} {v} {u}, limits {w} and {c}.",
    ),
    unseen=(
        "How serious is {d} {m} {v} {u} when the warning is {w} and critical is {c}?",
        "Should I worry about {v} {u} of {m} on {d}? It warns at {w} and trips at {c}.",
        "Judge this value: {d}, {m}, {v} {u}. Warning threshold: {w}, critical threshold: {c}.",
        "{d} says {v} {u} for {m}; is that ok, warning or critical given {w} and {c}?",
        "Assess the alarm on {d}: {m} at {v} {u} (limits: warning {w}, critical {c}).",
    ),
)

EXTRACT: Final = Phrasings(
    seen=(
        "Extract JSON: {r}.",
        "Extract device, metric, value and unit as JSON: {r}.",
        "[To|As|Into] JSON: {r}.",
        "[Turn|Convert] [this|this reading|the reading] into JSON: {r}.",
        "Record [this|this reading|the reading] as JSON: {r}.",
        "Give me the fields [of this reading |]as JSON: {r}.",
        "{r}, as JSON please.",
        "JSON[ please|]: {r}.",
        "[Turn|Make] [this|it|this sentence] [into|to] a JSON record: {r}.",
        "Write [this|the reading] as [a |]JSON[ object|]: {r}.",
        "{r}. Extract [the fields|device, metric, value and unit].",
        "What are device, metric, value and unit here: {r}?",
        "Structure this [reading|sentence|message]: {r}.",
        "Parse [this|this line|the message]: {r}.",
        "Fields of: {r}.",
    ),
    unseen=(
        "Extract the fields as JSON: {r}.",
        "Put this measurement into a JSON object: {r}.",
        "I need a structured record of this message: {r}.",
        "{r} - return it as JSON.",
        "Read out device, metric, value and unit from: {r}.",
    ),
)

READING: Final = Phrasings(
    seen=(
        "The {m} of {d} is {v} {u}",
        "{d} reports {m} {v} {u}",
        "{d} reports a {m} of {v} {u}",
        "At {t} {d} measured a {m} of {v} {u}",
        "{m} on {d} reached {v} {u} today",
        "[{s}] {d}: {m}={v}{u}",
        "{d} [shows|has|reads] {v} {u} {m}",
        "{v} {u} of {m} at {d}",
        "{d} {m} {v} {u}",
        "at {s} the {m} of {d} [is|was|reads] {v} {u}",
        "{m} [is|was] {v} {u} on {d}",
        "{t} {d} {m}: {v} {u}",
        "{d} sent {m} {v} {u} from {s}",
        "there [is|was] a {m} of {v} {u} at {d}",
    ),
    unseen=(
        "the sensor on {d} says {m} {v} {u}",
        "for {d} we measured {v} {u} of {m}",
        "{d} is at {v} {u} ({m})",
        "current {m} at {d} in {s}: {v} {u}",
    ),
)

SUMMARISE: Final = Phrasings(
    seen=(
        "Summari[s|z]e: {l}.",
        "Summari[s|z]e the readings: {l}.",
        "Summari[s|z]e in one sentence: {l}.",
        "Sum up[ in one sentence|]: {l}.",
        "[Short|One sentence|Brief] summary[ please|]: {l}.",
        "Put these values into [a sentence|a short summary|one sentence]: {l}.",
        "{l}. Summari[s|z]e[ this|].",
        "Summari[s|z]e [these|the] [values|readings|measurements][ for me|]: {l}.",
        "Write one sentence [about|on] these [readings|values]: {l}.",
        "Give [me |]a summary of {l}.",
        "[What do|Say what] these readings say[ in a sentence|]: {l}.",
        "Report: {l}. One sentence, please.",
    ),
    unseen=(
        "Summarise the readings of this hour in one sentence: {l}.",
        "Can you sum these measurements up: {l}?",
        "{l} - say it in one sentence.",
        "Make a short report out of: {l}.",
        "One line on the last values, please: {l}.",
    ),
)

CONVERT: Final = Phrasings(
    seen=(
        "Convert {x} {a} to {b}.",
        "How many {b} are {x} {a}?",
        "{x} {a} in {b}?",
        "What is {x} {a} in {b}?",
        "Change {x} {a} [to|into] {b}.",
        "[Give me|I need] {x} {a} in {b}.",
        "{x} {a} to {b}.",
        "How much is {x} {a} in {b}?",
        "Express {x} {a} in {b}.",
        "{x} {a} = ? {b}",
        "{x} {a} makes how many {b}?",
        "Write {x} {a} [as|in] {b}.",
    ),
    unseen=(
        "Turn {x} {a} into {b}.",
        "In {b}, what are {x} {a}?",
        "The meter shows {x} {a}; how many {b} is that?",
        "Recalculate {x} {a} as {b}.",
    ),
)

ADVISE: Final = Phrasings(
    seen=(
        "Suggest an action: {p}.",
        "What should [I|we] do? {p}.",
        "Recommend an action: {p}.",
        "{p}, what [now|next]?",
        "{p}, what should [I|we] do?",
        "{p}. What do you [advise|recommend]?",
        "{p}, [which|what] action do you suggest?",
        "What is the [right|best] action when {p}?",
        "What do we do [if|when] {p}?",
        "{p}. [Any advice|Advice|Help]?",
        "{p}, what action is needed?",
        "How do I [react|respond] when {p}?",
        "{p}: what to do?",
        "Advice please: {p}.",
        "Tell me what to do, {p}.",
    ),
    unseen=(
        "{p}, what do you advise?",
        "{p}, what do we do about it?",
        "Which step do you recommend now that {p}?",
        "We have a problem: {p}. Your advice?",
        "{p}. How should we handle this?",
    ),
)

PROBLEM: Final = Phrasings(
    seen=(
        "the {m} of {d} {x}",
        "{d} {m} {x}",
        "at {s} the {m} of {d} {x}",
        "the {m} [on|at|in] {d} {x}",
        "{m} [on|at] {d} {x}",
        "{d} has [a |]{m} of {v} {u}, [that|which|it] {x}",
        "the {m} of {d} is {v} {u}, [that|which|it] {x}",
        "{d}: {m} {v} {u}, {x}",
        "the {m} of {d} {x} at {v} {u}",
        "our {k} {d} reports that its {m} {x}",
        "{m} {x} on {d}",
    ),
    unseen=(
        "we see that the {m} of {d} {x}",
        "{d} in {s} tells us its {m} {x}",
        "with {v} {u} the {m} at {d} {x}",
    ),
)

TOPIC: Final = Phrasings(
    seen=(
        "MQTT topic for [the |]{m} of {d} at {s}?",
        "Build the MQTT topic: site {s}, device {d}, metric {m}.",
        "On which topic does {d} at {s} publish its {m}?",
        "Name the topic of [the |]{m} of {d} at {s}.",
        "Which [MQTT |]topic belongs to the {m} of {d} at {s}?",
        "[What is|Tell me] the [MQTT |]topic for {d} {m} at [site |]{s}?",
        "topic: {s} {d} {m}",
        "Where is the {m} of {d} at {s} published?",
        "Make [a|the] topic name for [the |]{m} of {d} at {s}.",
        "{d} at {s}, {m}: topic?",
        "Give me the topic name: {m} of {d}, site {s}.",
        "At {s}, which topic has the {m} of {d}?",
    ),
    unseen=(
        "Which MQTT topic carries the {m} of {d} at {s}?",
        "Under what topic can I subscribe to {m} of {d} in {s}?",
        "I want to listen to the {m} of {d} at {s}. Topic name?",
        "How is the topic called for {m} on {d} at {s}?",
    ),
)

TREND: Final = Phrasings(
    seen=(
        "Trend of {n}?",
        "What is the trend of {n}?",
        "Is this rising, falling or stable: {n}?",
        "Do these [numbers|values] [go|move] up or down: {n}?",
        "Where is this list heading: {n}?",
        "In [one|a] word, [what is|where is] this [list |]heading: {n}?",
        "Are these [values|numbers|readings] rising: {n}?",
        "Rising, falling or stable? {n}",
        "{n}: which trend?",
        "How [do|did] these readings develop: {n}?",
        "The last values were {n}. What is the trend?",
        "Trend [please|word]: {n}.",
    ),
    unseen=(
        "In a word, do these numbers rise, fall or stay: {n}?",
        "Which way do the values {n} go?",
        "Looking at {n}, would you say rising, falling or stable?",
        "Name the direction of {n}.",
    ),
)

TALK: Final = (
    (
        "Hello! I am a small edge model. Ask me about sensor readings.",
        Phrasings(
            seen=("Hello!", "Hi!", "Hi there!", "Hey!", "Good morning!", "Hello there.", "Hi you."),
            unseen=("Good evening!", "Hello model!"),
        ),
    ),
    (
        "I am a small model running on this node of the mesh.",
        Phrasings(
            seen=(
                "Who are you?",
                "What are you?",
                "Who is [this|there]?",
                "[What is|Tell me] your name?",
                "Introduce yourself.",
                "Who am I talking to?",
                "Are you a model?",
            ),
            unseen=("Tell me who you are.", "May I ask who you are?"),
        ),
    ),
    (
        (
            "I can classify alerts, extract JSON, summarise readings, convert units, suggest "
            "actions, name topics, spot trends, choose tools and split requests."
        ),
        Phrasings(
            seen=(
                "What can you do[ for me|]?",
                "What are you able to do?",
                "[What are|Tell me] your [skills|abilities]?",
                "How can you help[ me|]?",
                "Which tasks can you [do|handle]?",
                "[Hello|Hi], what can you do?",
                "What are you good at?",
                "What do you know?",
            ),
            unseen=(
                "Hello, what can you do for us?",
                "Which things are you able to do for me?",
                "List what you can do.",
            ),
        ),
    ),
    (
        "You are welcome.",
        Phrasings(
            seen=(
                "Thanks!",
                "Thank you[ very much|]!",
                "Thanks a lot.",
                "Great, thanks!",
                "Cheers!",
            ),
            unseen=("Many thanks!", "Thank you so much."),
        ),
    ),
    (
        "No. I run locally and need no internet.",
        Phrasings(
            seen=(
                "Are you online?",
                "Do you need [the |]internet?",
                "Do you run in the cloud?",
                "Are you [connected to|on] the internet?",
                "Do you need a [cloud|network] connection?",
                "Is my data sent to the cloud?",
            ),
            unseen=("Do you use the internet?", "Are you a cloud service?"),
        ),
    ),
    (
        "MQTT is a light publish and subscribe protocol for devices.",
        Phrasings(
            seen=(
                "What is MQTT?",
                "Explain MQTT.",
                "What does MQTT mean?",
                "Tell me about MQTT.",
                "MQTT, what is that?",
            ),
            unseen=("Can you explain what MQTT is?", "Describe MQTT."),
        ),
    ),
    (
        "I run on an edge device, without any cloud.",
        Phrasings(
            seen=(
                "Where do you run?",
                "Where are you[ running|]?",
                "On which [machine|device] do you run?",
                "Where do you live?",
                "What [hardware|machine] do you run on?",
            ),
            unseen=("Which computer are you running on?", "Tell me where you run."),
        ),
    ),
)
"""What the model says of itself, with the questions that lead there."""
