"""What the package promises beyond right answers, and the tests that hold it to that.

``test_promises.py`` looks that the tests exist, and the table of ``docs/tested.md`` is made of this list
(``python tests/robustness/bad_inputs/write.py``).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Promise:
    """One promise."""

    name: str
    says: str
    """What holds; a cell of the table."""
    tests: tuple[str, ...]
    """``file::function`` below ``tests``."""

    @property
    def row(self) -> str:
        """Row of the table in the docs."""
        return f"| {self.name} | {self.says} | {'<br>'.join(f'`{test}`' for test in self.tests)} |"


PROMISES = [
    Promise(
        "R1",
        "If a call is killed or interrupted, or the disk is full: a store shows the whole result or none of it, the same call "
        "completes it, and your data are not changed. If a dask worker dies, no result is lost.",
        (
            "robustness/test_interruptions.py::test_dense_map_killed_at_any_instant_is_shown_whole_or_not_at_all",
            "robustness/test_interruptions.py::test_tiles_finished_before_a_kill_are_not_computed_again",
            "robustness/test_interruptions.py::test_replacing_a_map_leaves_the_old_one_or_the_new_one",
            "robustness/test_interruptions.py::test_regions_interrupted_at_any_instant",
            "robustness/test_interruptions.py::test_features_killed_at_any_instant_are_taken_up",
            "robustness/test_interruptions.py::test_training_of_pixnet_killed_at_any_instant_is_taken_up",
            "robustness/test_interruptions.py::test_training_of_asign_killed_at_any_instant_is_taken_up",
            "robustness/test_interruptions.py::test_what_is_interrupted_leaves_the_object_as_it_was",
            "robustness/test_workers.py::test_map_of_two_workers_is_the_same_bytes_also_if_one_is_killed",
            "robustness/test_workers.py::test_features_as_a_task_survive_the_death_of_their_worker",
            "robustness/test_workers.py::test_registration_on_two_workers_is_the_same_bytes",
            "robustness/test_workers.py::test_what_only_the_dead_worker_had_is_sent_again",
        ),
    ),
    Promise(
        "R2",
        "No silent zeros: values that were not predicted are NaN, a map states how many of its tiles were predicted, and shapes "
        "without a pixel are NaN and counted.",
        (
            "robustness/test_same_anywhere.py::test_regions_without_a_pixel_are_nan_and_counted",
            "robustness/test_same_anywhere.py::test_a_map_says_how_much_of_it_was_predicted",
            "tl/test_predict_dense.py::test_what_was_not_predicted_is_nan",
            "tl/test_predict_dense.py::test_one_gene_of_many_is_read_without_the_others",
            "tl/test_fit_pixnet.py::test_regions_off_the_image_are_nan_and_counted",
            "robustness/test_properties.py::test_nothing_unmeasured_reaches_a_result",
            "robustness/test_properties.py::test_nothing_unmeasured_reaches_a_model",
        ),
    ),
    Promise(
        "R3",
        "Everything is joined by name: rows in another order give the same result in that order. Image and spots moved, "
        "turned, mirrored or scaled together give the same values. The centre of pixel i lies at i + 0.5.",
        (
            "robustness/test_properties.py::test_expression_is_joined_by_id_whatever_the_order",
            "robustness/test_properties.py::test_rows_of_the_stack_table_may_stand_in_any_order",
            "robustness/test_properties.py::test_graph_is_equivariant_to_permutation",
            "robustness/test_properties.py::test_graph_and_imputation_follow_the_frame",
            "robustness/test_properties.py::test_pixel_centres_lie_at_halves",
            "robustness/test_same_anywhere.py::test_regions_and_maps_follow_the_frame",
            "tl/test_fit_pixnet.py::test_predict_regions_joins_by_id_not_by_row",
            "models/asign/test_model.py::test_permuting_the_table_permutes_the_result",
            "models/pixnet/test_region_weights.py::test_disc_on_a_ramp_is_that_of_the_plane",
        ),
    ),
    Promise(
        "R4",
        "Bad input raises a named error before any work; a loss that is not finite stops the training.",
        (
            "robustness/test_bad_inputs.py::test_bad_input",
            "robustness/test_bad_inputs.py::test_cases_cover_every_public_function",
            "robustness/test_fuzz.py::test_files_of_random_bytes",
            "robustness/test_fuzz.py::test_damaged_weights",
            "models/asign/test_model.py::test_fit_stops_when_the_loss_is_not_finite",
        ),
    ),
    Promise(
        "R5",
        "The same seed gives the same bits; tiles and threads change at most the fifth digit; every result stores its origin, in "
        "plain JSON.",
        (
            "robustness/test_provenance.py::test_same_seed_gives_the_same_bits",
            "robustness/test_provenance.py::test_provenance_survives_every_store",
            "robustness/test_same_anywhere.py::test_threads_do_not_show",
            "tl/test_predict_dense.py::test_tiles_do_not_show",
        ),
    ),
    Promise(
        "R6",
        "Results have the same bytes in memory, backed by a store, read back, pickled, with and on dask workers, and in workers "
        "of a data loader; no call waits forever.",
        (
            "robustness/test_same_anywhere.py::test_a_stack_on_disk_or_from_another_process_gives_the_same_bytes",
            "robustness/test_same_anywhere.py::test_images_are_read_in_workers_of_a_data_loader",
            "robustness/test_workers.py::test_features_beside_workers_are_the_same_bytes",
            "robustness/test_workers.py::test_map_as_a_task_needs_no_second_worker",
            "tl/test_predict_dense.py::test_workers_write_the_same_bytes",
            "tl/test_register_stack.py::test_parallel_equals_serial",
            "test_ecosystem.py::test_python_versions_agree",
        ),
    ),
    Promise(
        "R7",
        "The package unpickles nothing, each of its downloads has a hash, no name leads out of a store, and sizes are checked "
        "before memory is used.",
        (
            "robustness/test_security.py::test_source_neither_unpickles_nor_unpacks_nor_starts_programs",
            "robustness/test_security.py::test_every_download_is_https_and_has_a_hash",
            "robustness/test_security.py::test_weights_with_code_in_them_are_refused",
            "robustness/test_security.py::test_zarr_of_absurd_shape_is_refused_before_memory_is_taken",
            "robustness/test_security.py::test_no_name_leads_out_of_a_store",
            "robustness/test_security.py::test_archives_are_not_unpacked",
        ),
    ),
    Promise(
        "R8",
        "After calls and edits in any order, a result belongs to the present data, or an error or a warning says on which data it "
        "depends. If two processes write to one place, the result of one of them is stored, and none of your files is replaced.",
        (
            "robustness/test_state.py::test_sequence_of_calls_and_edits_gives_present_results_or_says_so",
            "robustness/test_state.py::test_what_was_not_edited_is_used_without_a_word",
            "robustness/test_state.py::test_every_edit_can_be_repaired",
            "robustness/test_races.py::test_two_processes_at_one_place",
            "robustness/test_races.py::test_second_model_leaves_the_map_of_the_first_alone",
            "robustness/test_races.py::test_an_image_of_the_user_is_never_replaced",
            "robustness/test_races.py::test_cached_features_are_checked_when_they_are_read",
            "robustness/test_races.py::test_a_checkpoint_whose_numbers_were_changed_is_refused",
            "robustness/test_security.py::test_a_foreign_configuration_is_not_replaced",
        ),
    ),
]


def table(promises: list[Promise]) -> str:
    """Table of the docs."""
    return "| | promise | tests |\n|---|---|---|\n" + "\n".join(promise.row for promise in promises) + "\n"
