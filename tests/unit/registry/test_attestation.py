"""Evidence: what is read, what fits, and which rights go when it does not."""

import json
import re
import struct
from typing import Any

import pytest

from capability_schemas.capability import CapabilityPolicy
from capability_schemas.errors import (
    AccessDenied,
    BadSignature,
    ConfigurationError,
    MalformedPayload,
    TooLarge,
)
from capability_schemas.passport import CLOCK_SKEW_MS
from capability_schemas.signing import SigningKey, sign
from capability_schemas.trust import EVIDENCE_LIMIT_BYTES, MAX_MEASUREMENTS, Evidence
from capability_schemas.wire import encode
from registry.admission import ALL_DATA
from registry.attestation.judgement import (
    challenge_of,
    judge_evidence,
    misfits,
    read_evidence,
)
from registry.attestation.policy import (
    AttestationFile,
    Gates,
    Reference,
    parse_policy,
    reference_toml,
)
from support.tpm import SoftTpm

NOW = 1_790_000_000_000
NODE = SigningKey.generate()
A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64
POLICY = f"""
valid_for = "1h"
[references.plant]
"code/*" = ["{A}", "{B}"]
"function/convert" = ["{A}"]
"model/*" = "any"
[[rules]]
nodes = ["press-*"]
references = ["plant"]
gates = {{ data = ["private"], grants = ["actuate"] }}
"""
PCRS = f'[[rules]]\ngates={{zones=["a"]}}\npcrs=["{"0" * 64}"]\n'
GOOD = {"code/foam": A, "code/broker": B, "function/convert": A, "model/tiny.gguf": B}


def evidence(**changes):
    given: dict[str, Any] = {"node": "press-7", "epoch": 1, "at": NOW, "measurements": GOOD}
    return Evidence(**given | changes)


def shown(**changes):
    return encode(sign(evidence(**changes), NODE))


def read(payload, **changes):
    given: dict[str, Any] = {"node": "press-7", "key": NODE.public, "now": NOW}
    return read_evidence(payload, **given | changes)


def judge(policy, found, *, node="press-7", attested=ALL_DATA):
    return judge_evidence(
        policy, node=node, attested=attested, evidence=found, missing="nothing was shown"
    )


class TestReading:
    def test_what_its_node_signed_is_taken(self):
        assert read(shown()).measurements == GOOD

    @pytest.mark.parametrize(
        ("payload", "refused", "words"),
        [
            (shown(node="press-8"), MalformedPayload, "of press-8, its topic of press-7"),
            (encode(evidence()), BadSignature, "not signed"),
            (encode(sign(evidence(), SigningKey.generate())), BadSignature, "does not fit"),
            (shown().replace(b"convert", b"konvert"), BadSignature, "does not fit"),
            (shown(at=NOW + CLOCK_SKEW_MS + 1_000), AccessDenied, "set the clock of press-7"),
            (b"{" + b" " * EVIDENCE_LIMIT_BYTES, TooLarge, "bytes"),
            (b"[]", MalformedPayload, "object"),
        ],
        ids=["another node", "unsigned", "another key", "flipped", "future", "large", "no object"],
    )
    def test_anything_else_is_refused_by_words(self, payload, refused, words):
        with pytest.raises(refused, match=words):
            read(payload)

    def test_a_clock_that_is_a_little_ahead_or_far_behind_does_not_matter(self):
        assert read(shown(at=NOW + CLOCK_SKEW_MS)).at == NOW + CLOCK_SKEW_MS
        assert read(shown(at=NOW - 30 * 86_400_000)).at < NOW

    def test_thousands_of_files_are_too_many(self):
        many = {f"function/{number}": A for number in range(MAX_MEASUREMENTS + 1)}
        fields = json.loads(shown())
        fields["measurements"] = many
        with pytest.raises(MalformedPayload, match="measurements"):
            read(json.dumps(fields).encode())


class TestChallenge:
    def test_it_is_another_one_for_each_node_window_and_registry(self):
        def challenge(key=NODE, **changes):
            given: dict[str, Any] = {"site": "local", "node": "press-7"}
            given |= {"window": 5, "window_ms": 1_000}
            return challenge_of(key, **given | changes)

        made = {
            challenge(),
            challenge(node="press-8"),
            challenge(window=6),
            challenge(site="other"),
            challenge(window_ms=2_000),
            challenge(SigningKey.generate()),
        }
        assert len(made) == 6
        assert challenge() in made


class TestJudgement:
    def test_what_fits_keeps_its_rights(self):
        judged = judge(parse_policy(POLICY, "t"), evidence())
        assert (judged.asked, judged.problems, bool(judged.withheld)) == (True, (), False)

    @pytest.mark.parametrize(
        ("measured", "words"),
        [
            ({**GOOD, "code/foam": "sha256:" + "c" * 64}, "code/foam is sha256:cccccccccccc…"),
            ({**GOOD, "function/evil": A}, "function/evil is not named there"),
            (
                {name: one for name, one in GOOD.items() if name != "function/convert"},
                "function/convert was not measured",
            ),
        ],
    )
    def test_what_does_not_fit_loses_exactly_what_the_rule_gates(self, measured, words):
        judged = judge(parse_policy(POLICY, "t"), evidence(measurements=measured))
        assert words in judged.problems[0]
        kept = judged.withheld.taken_from(
            CapabilityPolicy(zones=("hall-3",), grants=("actuate", "read"))
        )
        assert kept == CapabilityPolicy(
            zones=("hall-3",), grants=("read",), data=("public", "internal")
        )

    def test_no_evidence_is_as_bad_as_a_wrong_one(self):
        judged = judge(parse_policy(POLICY, "t"), None)
        assert judged.problems == ("nothing was shown",)
        assert judged.withheld == Gates(grants=("actuate",), data=("private",))

    def test_a_node_that_no_rule_concerns_is_asked_for_nothing(self):
        assert not judge(parse_policy(POLICY, "t"), None, node="edge-1").asked

    def test_rules_may_go_by_zone(self):
        policy = parse_policy('[[rules]]\nzones = ["hall-3"]\ngates = {zones = ["hall-3"]}', "t")
        assert judge(policy, None, attested=CapabilityPolicy(zones=("hall-3",))).problems
        assert not judge(policy, None, attested=CapabilityPolicy(zones=("hall-4",))).asked

    def test_each_rule_takes_its_own_rights(self):
        text = POLICY + '[[rules]]\nreferences = ["plant"]\ngates = {zones = ["safe"]}\n'
        text += '[[rules]]\ngates = {zones = ["any"]}\n'
        judged = judge(parse_policy(text, "t"), evidence(measurements={"code/x": A}))
        assert judged.withheld == Gates(zones=("safe",), grants=("actuate",), data=("private",))

    def test_the_longest_name_counts(self):
        reference: Reference = {"code/*": "any", "code/foam": (A,), "code/f*": (B,)}
        assert misfits(reference, {"code/foam": A, "code/broker": B, "code/flow": B}) == []
        assert misfits(reference, {"code/foam": B, "code/flow": A}) == [
            f"code/flow is {A[:19]}…",
            f"code/foam is {B[:19]}…",
        ]

    def test_a_reference_made_of_evidence_fits_it(self):
        text = reference_toml("press-7", GOOD) + POLICY.replace("valid_for", "# valid_for")
        policy = parse_policy('valid_for = "10m"\n' + text, "t")
        assert misfits(policy.references["press-7"], GOOD) == []
        assert misfits(policy.references["press-7"], {**GOOD, "code/foam": B})


class TestTpm:
    CHALLENGE = "5f" * 32

    def policy(self, tpm, pcrs):
        return parse_policy(
            f'[[rules]]\ngates = {{data = ["private"]}}\npcrs = ["{pcrs}"]\n'
            f'[tpm2]\npress-7 = """{tpm.public}"""\n',
            "t",
        )

    def said(self, tpm, challenge=CHALLENGE, **changes):
        statement = {"source": "tpm2", "data": tpm.quote(challenge) | changes}
        return evidence(challenge=self.CHALLENGE, statements=[statement])

    @pytest.mark.parametrize("kind", ["rsa", "ec"])
    def test_its_quote_of_the_right_registers_counts(self, kind):
        tpm = SoftTpm(kind)
        assert judge(self.policy(tpm, tpm.registers), self.said(tpm)).problems == ()

    def test_other_registers_an_old_quote_and_another_chip_do_not(self):
        tpm, other = SoftTpm("rsa"), SoftTpm("rsa")
        policy = self.policy(tpm, tpm.registers)
        for found, words in (
            (self.said(tpm, challenge="00" * 32), "answers another challenge"),
            (self.said(other), "does not fit"),
            (self.said(tpm, quoted=other.quote("5f" * 32)["quoted"][:-8]), "does not fit"),
            (self.said(tpm, signature="AAAA"), "cut off|RSASSA"),
            (self.said(tpm, signature="?"), "no base64"),
            (evidence(challenge=self.CHALLENGE), "shows no quote"),
        ):
            (problem,) = judge(policy, found).problems
            assert re.search(words, problem), problem
        (problem,) = judge(self.policy(tpm, "0" * 64), self.said(tpm)).problems
        assert "which no rule accepts" in problem
        (problem,) = judge(
            parse_policy(f'[[rules]]\ngates={{data=["private"]}}\npcrs=["{"0" * 64}"]', "t"),
            self.said(tpm),
        ).problems
        assert "no key of its TPM is on record" in problem

    @pytest.mark.parametrize(
        ("banks", "words"),
        [
            (
                ((0x000B, b"\x00\x00\x01"),),
                "registers sha256:16, sha256:0,1,2,3,4,7 are",
            ),
            (((0x000B, b"\x8f\x00\x00"),), "sha256:0,1,2,3,7,"),
            (((0x000B, b"\x9f\x01\x00"),), "sha256:0,1,2,3,4,7,8,"),
            (((0x0004, b"\x9f\x00\x00"),), "sha1:0,1,2,3,4,7,"),
            (((0x0012, b"\x9f\x00\x00"),), "0x0012:0,1,2,3,4,7,"),
            (((0x000B, b"\x9f\x00\x00"), (0x0004, b"\x01\x00\x00")), r"4,7\+sha1:0,"),
            ((), "registers , sha256"),
        ],
        ids=["resettable", "fewer", "more", "old hash", "unknown hash", "two banks", "none"],
    )
    def test_right_digest_of_other_registers_does_not_count(self, banks, words):
        selection = struct.pack(">I", len(banks))
        for algorithm, mask in banks:
            selection += struct.pack(">HB", algorithm, len(mask)) + mask
        tpm = SoftTpm("ec", selection=selection)
        (problem,) = judge(self.policy(tpm, tpm.registers), self.said(tpm)).problems
        assert re.search(words, problem), problem

    def test_a_rule_may_ask_for_other_registers_and_a_mask_may_be_longer(self):
        tpm = SoftTpm("ec", selection=struct.pack(">IHB", 1, 0x000C, 4) + b"\x81\x00\x00\x00")
        text = f'pcrs = ["{tpm.registers}"]\nregisters = "sha384:7,0"\n[tpm2]\n'
        text += f'press-7 = """{tpm.public}"""'
        policy = parse_policy(f'[[rules]]\ngates = {{data = ["private"]}}\n{text}', "t")
        assert policy.rules[0].registers == "sha384:0,7"
        assert judge(policy, self.said(tpm)).problems == ()
        (problem,) = judge(policy, self.said(SoftTpm("ec", private=tpm.private))).problems
        assert "sha384:0,7 are asked for" in problem

    def test_a_statement_that_is_no_text_of_ours_is_refused_by_words(self):
        tpm = SoftTpm("ec")
        (problem,) = judge(self.policy(tpm, tpm.registers), self.said(tpm, quoted="é")).problems
        assert "no base64" in problem


class TestFile:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("valid_for = 60", "number and s, m, h or d"),
            ('valid_for = "1s"', "from 10 s to 30 d"),
            ("[[rules]]\nnodes = []", "gates"),
            ("[[rules]]\ngates = {}", "at least one"),
            ('[[rules]]\nreferences=["x"]\ngates={zones=["a"]}', r"no such table \[references.x\]"),
            ('[references.x]\n"code/*" = ["md5:0"]', "references.x"),
            ("nonsense = 1", "nonsense: unknown field"),
            ("[[", "t: "),
            ("x = " + "[" * 9_000, "nested too deeply"),
            ("x = " + "9" * 9_000, "t: .*digits"),
            (f'{PCRS}registers = "sha1:0"', "one of the banks"),
            (f'{PCRS}registers = "sha256:24"', "from 0 to 23"),
            (f'{PCRS}registers = "sha256"', "such as"),
            ('[[rules]]\ngates={zones=["a"]}\nregisters="sha256:0"', "name in pcrs too"),
        ],
    )
    def test_mistakes_are_said(self, text, words):
        with pytest.raises(ConfigurationError, match=words):
            parse_policy(text, "t")

    def test_an_edit_counts_when_it_has_settled_and_a_mistake_changes_nothing(self, tmp_path):
        path = tmp_path / "attestation.toml"
        file = AttestationFile(path)
        file.load()

        def rules():
            return len(file.policy.rules)

        assert rules() == 0
        path.write_text(POLICY)
        assert [file.refresh(), file.refresh()] == [False, True]
        assert rules() == 1
        path.write_text("[[")
        assert [file.refresh(), file.refresh()] == [False, False]
        assert rules() == 1
        assert "attestation.toml" in str(file.problem)
        path.unlink()
        assert [file.refresh(), file.refresh()] == [False, True]
        assert (rules(), file.problem) == (0, None)

    def test_a_registry_does_not_start_on_a_broken_one(self, tmp_path):
        (tmp_path / "attestation.toml").write_text("[[")
        with pytest.raises(ConfigurationError, match=r"attestation\.toml"):
            AttestationFile(tmp_path / "attestation.toml").load()
