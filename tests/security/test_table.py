"""The security table of a deployment: every row, and the tests on real sockets that show it.

A row is here once; most of its tests are where the part is tested. The last word of a row names
a control: a test in which the same thing without the protection, or with the right credentials,
goes through.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOWER, LINK, WIRE = "server/test_flower.py", "client/test_link.py", "security/test_public_port.py"
STUDY, REAL, ADMIN = (
    f"security/test_{name}.py" for name in ("rogue_study", "processes", "operators_port")
)
REVIEW, HOST = "client/hospital/test_review.py", "client/hospital/test_hospital.py"
EXCHANGE, APP = "server/test_exchange.py", "client/test_app.py"
ROGUE = "security/test_rogue_coordinator_wire.py"

TABLE: dict[str, tuple[list[str], str]] = {
    "no credentials on any port": (
        [
            f"{FLOWER}::test_nothing_but_the_calls_of_a_hospital_is_served_in_public",
            f"{FLOWER}::test_without_a_key_no_call_is_answered",
            f"{FLOWER}::test_every_admin_path_wants_the_token",
            f"{ADMIN}::test_no_path_at_all_answers_without_the_token",
            f"{REAL}::test_the_operators_port_of_the_process_wants_its_token",
            f"{REAL}::test_the_health_port_tells_its_health_and_nothing_else",
            f"{WIRE}::test_only_a_hospital_that_is_known_hears_the_release",
        ],
        f"{FLOWER}::test_the_same_call_with_a_registered_key_is_served",
    ),
    "stolen headers replayed": (
        [
            f"{WIRE}::test_no_request_that_was_served_is_served_again_to_another",
            f"{WIRE}::test_stolen_headers_do_not_serve_another_request_either",
            f"{WIRE}::test_while_a_request_waits_its_headers_serve_nobody_else",
            f"{WIRE}::test_a_refused_request_uses_nobodys_moment_up",
            f"{FLOWER}::test_stolen_headers_do_not_outlive_their_time",
            f"{WIRE}::test_an_answer_that_was_given_before_is_refused_by_its_nonce",
            f"{EXCHANGE}::test_an_answer_to_an_earlier_question_is_not_one_to_this",
        ],
        f"{WIRE}::test_control_a_moment_that_was_not_used_would_serve",
    ),
    "unregistered key": (
        [
            f"{FLOWER}::test_a_key_that_is_not_registered_is_refused",
            f"{FLOWER}::test_a_registered_key_without_its_private_half_is_refused",
            f"{FLOWER}::test_only_a_p384_key_is_registered",
        ],
        f"{FLOWER}::test_the_same_call_with_a_registered_key_is_served",
    ),
    "revoked key": (
        [
            f"{FLOWER}::test_a_revoked_key_is_out_at_once_and_for_good",
            "client/test_link_coordinator.py::test_a_revoked_key_is_out_at_once_and_a_new_one_is_let_in",
            f"{EXCHANGE}::test_a_forgotten_site_that_comes_back_on_another_node_is_refused",
            "enrolment/test_admission.py::test_a_revoked_hospital_is_not_in_the_next_roster_and_its_keys_never_return",
        ],
        f"{FLOWER}::test_a_new_key_of_a_site_takes_the_place_of_the_old",
    ),
    "wrong CA": (
        [
            f"{LINK}::test_only_the_pinned_authority_is_trusted",
            f"{LINK}::test_a_certificate_for_another_name_is_refused",
            f"{LINK}::test_nothing_below_tls_1_3_is_spoken",
            f"{FLOWER}::test_an_old_tls_version_is_refused",
            "server/test_pki.py::test_another_authority_another_name_and_an_old_certificate_are_refused",
            "enrolment/test_admission.py::test_an_invite_with_another_ca_or_another_key_is_refused",
        ],
        "server/test_pki.py::test_a_hospital_that_pins_the_authority_reaches_every_name",
    ),
    "another hospital's identity": (
        [
            f"{WIRE}::test_an_answer_under_another_hospitals_name_or_key_is_refused",
            f"{FLOWER}::test_a_key_does_not_speak_for_another_node",
            f"{EXCHANGE}::test_a_node_registered_as_another_site_is_refused",
            f"{EXCHANGE}::test_a_site_may_not_answer_in_the_name_of_another",
        ],
        f"{FLOWER}::test_the_exchange_speaks_with_a_hospital_over_the_wire",
    ),
    "a rogue coordinator": (
        [
            f"{ROGUE}::test_the_attack_is_refused_over_the_transport_too",
            f"{ROGUE}::test_the_attack_is_refused_over_real_sockets_too",
            f"{STUDY}::test_another_coordinators_question_is_not_answered_at_all",
            f"{APP}::test_a_question_the_pinned_coordinator_did_not_sign_for_this_site_is_not_asked",
            f"{APP}::test_not_one_line_of_an_offered_app_runs",
            "client/test_link_questions.py::test_whatever_a_part_holds_is_read_or_refused",
        ],
        f"{ROGUE}::test_control_what_is_genuine_is_answered_over_the_same_transport",
    ),
    "a rogue study": (
        [
            f"{STUDY}::test_a_study_that_nobody_approved_gets_a_code_and_no_byte_more",
            f"{STUDY}::test_another_offer_or_roster_than_was_approved_stops_the_study",
            f"{REVIEW}::test_only_what_the_pinned_coordinator_offers_to_this_hospital_can_be_approved",
            f"{REVIEW}::test_an_older_roster_is_not_accepted_after_a_newer_one",
            f"{HOST}::test_nothing_runs_unapproved",
            f"{HOST}::test_an_approval_that_was_touched_approves_nothing",
            "enrolment/test_publish.py::test_an_offer_of_another_key_study_or_roster_is_refused",
        ],
        f"{STUDY}::test_control_an_approved_study_is_answered",
    ),
    "another code digest": (
        [
            f"{STUDY}::test_a_study_above_a_ceiling_or_other_code_is_not_worked_on",
            f"{HOST}::test_code_that_is_not_what_was_approved_does_no_work",
            "client/hospital/test_code_digest.py::test_any_change_of_what_may_run_changes_the_digest",
        ],
        "client/hospital/test_code_digest.py::test_the_same_code_in_another_place_has_the_same_digest",
    ),
    "a study above each ceiling": (
        [
            f"{STUDY}::test_a_study_above_a_ceiling_or_other_code_is_not_worked_on",
            f"{REVIEW}::test_every_reason_to_refuse_is_listed_and_none_can_be_approved",
            f"{HOST}::test_a_ceiling_that_is_lowered_after_the_approval_binds",
            "client/test_approval.py::test_no_study_above_a_ceiling_is_ever_approved",
        ],
        "client/test_approval.py::test_a_study_exactly_at_every_ceiling_is_approved",
    ),
    "port scan of the hospital": (
        [
            f"{REAL}::test_a_hospital_listens_on_nothing_and_its_trainers_neither",
            f"{LINK}::test_the_hospitals_process_listens_on_nothing",
        ],
        f"{REAL}::test_the_coordinator_listens_on_one_public_port_and_on_loopback",
    ),
    "admin port from outside": (
        [
            f"{REAL}::test_from_outside_only_the_public_port_is_there",
            f"{FLOWER}::test_the_admin_listener_is_on_loopback_only",
            f"{ADMIN}::test_in_public_the_token_opens_nothing",
        ],
        f"{ADMIN}::test_control_with_the_token_the_same_paths_are_reached",
    ),
    "oversized and malformed bodies": (
        [
            f"{WIRE}::test_random_bodies_of_a_hospital_neither_stop_nor_fill_the_coordinator",
            f"{WIRE}::test_a_hostile_answer_reaches_nobody",
            f"{FLOWER}::test_a_body_of_unknown_length_is_cut_off_at_the_bound",
            f"{FLOWER}::test_a_malformed_body_is_refused_and_nothing_breaks",
            f"{FLOWER}::test_an_answer_whose_parts_contradict_each_other_becomes_an_error",
            f"{LINK}::test_an_answer_without_end_is_cut_off",
        ],
        f"{FLOWER}::test_a_part_as_large_as_allowed_is_looked_at_and_a_larger_one_is_not",
    ),
    "callers that never finish": (
        [
            f"{WIRE}::test_a_caller_that_never_finishes_its_head_is_hung_up_on",
            f"{WIRE}::test_a_body_that_never_ends_is_hung_up_on_and_a_strangers_is_not_awaited",
        ],
        f"{WIRE}::test_callers_who_fill_every_place_are_gone_soon_and_hospitals_are_back",
    ),
    "secrets in ps, environment dumps and logs": (
        [
            f"{REAL}::test_no_secret_is_in_ps_environ_or_logs",
            f"{REAL}::test_no_record_is_in_ps_environ_or_logs_of_a_hospital_and_nothing_of_it_at_the_coordinator",
            f"{REAL}::test_no_secret_of_a_hospital_is_anywhere_at_the_coordinator_or_at_another",
            f"{REAL}::test_what_a_party_keeps_is_for_its_owner_only",
            f"{FLOWER}::test_no_secret_is_on_disk_or_in_the_database",
            f"{APP}::test_an_exception_leaves_as_a_signed_code_and_never_as_text",
            "adversary/test_leaks.py::test_no_window_of_a_plain_update_is_on_the_wire_or_on_a_disk",
            "common/test_logs.py::test_whatever_is_logged_only_tokens_and_numbers_come_out",
        ],
        f"{REAL}::test_control_a_planted_secret_is_found_wherever_it_is_planted",
    ),
}


@cache
def named_in(path: str) -> frozenset[str]:
    file = ROOT / "tests" / path
    text = file.read_text() if file.is_file() else ""
    return frozenset(re.findall(r"^def (test_\w+)", text, re.MULTILINE))


def missing(names: list[str]) -> list[str]:
    return [name for name in names if name.split("::")[1] not in named_in(name.split("::")[0])]


@pytest.mark.parametrize("row", TABLE)
def test_every_row_has_its_tests_and_a_control(row: str):
    shown, control = TABLE[row]
    assert shown
    assert control not in shown
    assert missing([*shown, control]) == []


def test_control_a_test_that_nobody_wrote_is_noticed():
    assert missing([f"{FLOWER}::test_nobody_wrote_this", "server/gone.py::test_x"]) == [
        f"{FLOWER}::test_nobody_wrote_this",
        "server/gone.py::test_x",
    ]


def test_the_table_has_every_row():
    assert len(TABLE) == 15
