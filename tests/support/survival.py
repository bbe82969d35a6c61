"""What survives what, and the test that holds it: the cells of docs/survives.md, which `.ci/survives.py` writes.

A cell says what becomes of a command that meets a fault. A test is ``path::name`` below ``tests/``.
"""

from __future__ import annotations

from typing import NamedTuple

WAYS = ("run", "lm_eval", "evaluate_from_model", "score", "Python")
"""The columns. lm_eval and Python: with ``journal=``."""

GOES_ON = "goes on"
"""The same command goes on from the finished answers, and ends with those of an undisturbed run."""
RECOVERS = "recovers"
"""Nobody notices, but for the time it takes."""
REFUSED = "refused"
"""One error before weights load; nothing is changed."""
SAID = "one error"
"""And the records are as they were."""
NOTICED = "noticed"
"""What was answered before is not used: it is refused, or, in a journal, answered anew beside it."""
SET_ASIDE = "set aside"
"""The damaged part is moved away and decoded again."""


class Fault(NamedTuple):
    fault: str
    cells: dict[str, tuple[str, str]]
    """Column -> what becomes of it, and the test; columns that are missing have nothing to lose."""


_KILLS = "system/test_kills.py::test_killed_whenever_something_reaches_the_disk"
_STOPPED = "system/test_stopping.py::test_at_any_moment"
_LOCKED = "records/test_lock.py::test_the_second_process_is_refused_before_models_load_and_told_who_is_there"
_MEMORY = "system/test_out_of_memory_anywhere.py::test_one_failure_anywhere_changes_nothing"
_FULL = "system/test_full_disks.py::test_a_journal_on_a_full_disk_keeps_what_it_has_and_goes_on_later"
_FULL_RUN = "system/test_full_disks.py::test_a_run_whose_disk_is_full_says_so_once_and_is_completed_by_the_same_command"
_RANKS = "system/test_ranks.py::test_whichever_rank_dies_whenever_the_others_name_it"
_JOINED = "system/test_joined_runs.py::test_killed_whenever_something_reaches_the_disk_the_others_take_its_prompts_over"
_JOINED_RUN = "system/test_joined_runs.py::test_commands_on_one_folder_leave_the_archive_of_one"
_WORLDS = "system/test_ranks.py::test_a_stopped_run_goes_on_in_another_world_with_the_same_bits"
_BACK = "system/test_servers_that_return.py::test_a_server_that_is_back_in_time_changes_nothing"
_LATE = "system/test_servers_that_return.py::test_a_server_that_is_back_too_late_costs_no_finished_answer"
_SERVERS = "rewards/test_servers.py::test"
_OTHER_MODEL = f"{_SERVERS}_a_server_that_comes_back_with_another_model_is_refused_and_with_its_own_is_not"
_OTHER_RECORDS = f"{_SERVERS}_answers_scored_by_another_model_at_the_same_address_are_not_taken"
_NOTICED = "system/test_noticed.py::test_every_argument_is_noticed"
_JOURNALS = "system/test_fuzzed_records.py::test_journals"
_FOLDERS = "system/test_fuzzed_records.py::test_folders_of_answers"
_PATHS = "system/test_full_disks.py::test_a_path_that_can_be_none_is_one_error_in_every_command"
_PATHS_LOADED = "system/test_full_disks.py::test_a_path_that_can_be_none_is_told_before_models_load"
_READ_ONLY = "system/test_full_disks.py::test_a_place_that_this_user_may_not_write_is_one_error"
_TEMPLATES = "test_chat_templates.py::test_a_template_that_never_ends_is_one_error"

TABLE = (
    Fault(
        "`kill -9`, or the power goes, at any moment",
        {
            "run": (GOES_ON, _KILLS),
            "lm_eval": (GOES_ON, _KILLS),
            "evaluate_from_model": (GOES_ON, _KILLS),
            "score": (GOES_ON, "commands/test_score.py::test_a_stopped_command_goes_on"),
            "Python": (GOES_ON, "records/test_records.py::test_any_damage_is_borne"),
        },
    ),
    Fault(
        "Ctrl-C, SIGTERM",
        {
            "run": (GOES_ON, _STOPPED),
            "lm_eval": (GOES_ON, _STOPPED),
            "score": (GOES_ON, "commands/test_score.py::test_a_stopped_command_says_how_many_rows_are_on_disk"),
        },
    ),
    Fault(
        "one of several processes dies",
        {"run": (GOES_ON, _RANKS), "lm_eval": (GOES_ON, _RANKS)},
    ),
    Fault(
        "one of several processes that join (`join=True`) dies",
        {"run": (RECOVERS, _JOINED_RUN), "lm_eval": (RECOVERS, _JOINED), "Python": (RECOVERS, _JOINED)},
    ),
    Fault(
        "going on with another number of processes",
        {"run": (GOES_ON, _WORLDS)},
    ),
    Fault(
        "memory runs out, at any allocation",
        {way: (RECOVERS, _MEMORY) for way in ("run", "lm_eval", "evaluate_from_model", "Python")},
    ),
    Fault(
        "the disk is full",
        {
            "run": (GOES_ON, _FULL_RUN),
            "lm_eval": (GOES_ON, _FULL),
            "evaluate_from_model": (GOES_ON, _FULL_RUN),
            "score": (
                GOES_ON,
                "system/test_full_disks.py::test_a_process_that_goes_on_after_a_full_disk_writes_whole_lines",
            ),
            "Python": (GOES_ON, _FULL),
        },
    ),
    Fault(
        "a place that may not be written, a path that can be none",
        {
            "run": (REFUSED, _READ_ONLY),
            "lm_eval": (REFUSED, _PATHS_LOADED),
            "score": (SAID, _PATHS),
            "Python": (REFUSED, _PATHS_LOADED),
        },
    ),
    Fault(
        "a reward server is gone for a moment",
        {
            **{way: (RECOVERS, _BACK) for way in ("run", "lm_eval", "evaluate_from_model", "Python")},
            "score": (RECOVERS, _BACK),
        },
    ),
    Fault(
        "a reward server is gone for good",
        {
            **{way: (GOES_ON, _LATE) for way in ("run", "lm_eval", "evaluate_from_model", "Python")},
            "score": (GOES_ON, "commands/test_score.py::test_a_server_that_goes_away_is_one_error_and_nothing_is_lost"),
        },
    ),
    Fault(
        "a reward server comes back with another model",
        {
            **{way: (GOES_ON, _OTHER_MODEL) for way in ("run", "lm_eval", "evaluate_from_model", "Python")},
            "score": (GOES_ON, _OTHER_MODEL),
        },
    ),
    Fault(
        "records of a server that holds another model now",
        {
            **{way: (NOTICED, _OTHER_RECORDS) for way in ("run", "lm_eval", "evaluate_from_model", "Python")},
            "score": (NOTICED, "commands/test_score.py::test_rows_scored_by_another_model_are_not_gone_on_with"),
        },
    ),
    Fault(
        "a second process on the same records",
        {way: (REFUSED, _LOCKED) for way in WAYS},
    ),
    Fault(
        "records that were damaged or edited",
        {
            "run": (SET_ASIDE, _FOLDERS),
            "lm_eval": (SET_ASIDE, _JOURNALS),
            "evaluate_from_model": (SET_ASIDE, _FOLDERS),
            "score": (SAID, "commands/test_score.py::test_another_reward_or_another_file_is_never_mixed_in"),
            "Python": (SET_ASIDE, _JOURNALS),
        },
    ),
    Fault(
        "another argument, weight file or reward function",
        {
            "run": (NOTICED, _NOTICED),
            "lm_eval": (NOTICED, _NOTICED),
            "evaluate_from_model": (NOTICED, _NOTICED),
            "score": (NOTICED, "commands/test_score.py::test_another_reward_or_another_file_is_never_mixed_in"),
            "Python": (NOTICED, _NOTICED),
        },
    ),
    Fault(
        "a chat template that loops for ever",
        {way: (SAID, _TEMPLATES) for way in WAYS},
    ),
)
