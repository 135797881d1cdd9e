"""Known ways to lose or spoil weights without a word, and the tests that show each of them right or refused here.

What PEFT 0.21.2 and mergekit 0.1.5 do in these cases was measured; traps of the field are from papers, issue threads
and release notes. A test is named by its file under tests/ and its function;
tests/test_promises.py holds that it is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Promise:
    """One case."""

    case: str
    tests: tuple[str, ...]
    """`file::test` below tests/."""


def _of(file: str, *tests: str) -> tuple[str, ...]:
    return tuple(f"{file}.py::test_{test}" for test in tests)


_WEIGHTED: Final = "merger/parity/test_peft_weighted"
_FOLD: Final = "merger/parity/test_peft_fold"
_LOADS: Final = "merger/parity/test_loads"
_MERGE: Final = "merger/adapters/test_merge"
_EXPERTS: Final = "merger/adapters/test_experts"
_RENAMES: Final = "merger/adapters/test_renames"
_CATALOG: Final = "merger/test_catalog"
_REFUSALS: Final = "merger/test_refusals"
_FAN_IN: Final = "merger/test_fan_in"
_WORDS: Final = "merger/test_vocabulary"
_MODELS: Final = "merger/methods/test_models"
_SPARSE: Final = "merger/methods/test_sparse"
_FAMILIES: Final = "merger/parity/test_families"
_LOAD: Final = "merger/manifest/test_load"
_PARITY: Final = "mergekit/test_parity"

PEFT: Final[tuple[Promise, ...]] = (
    Promise("a first adapter with use_rslora scales the merge by √r again", _of(
        _WEIGHTED, "rslora_first_is_scaled_once", "peft_is_still_wrong_about_rslora")),
    Promise("magnitudes of DoRA sources are started anew, or dropped", (
        *_of(_WEIGHTED, "what_peft_loses_is_refused_by_name"),
        *_of(_MERGE, "two_kinds_into_a_lora", "ties_of_a_lora_and_a_dora_is_that_of_their_models"))),
    Promise("lora_bias is dropped", (
        *_of(_WEIGHTED, "what_peft_loses_is_refused_by_name"),
        *_of(_MERGE, "biases_and_tokens_do_not_fit_a_plain_adapter"))),
    Promise("a module saved whole becomes the base's, or is lost", _of(
        _MERGE, "heads_are_averaged_or_chosen", "heads_are_refused_without_a_word")),
    Promise("rows of trained tokens become the base's", (
        *_of(_WEIGHTED, "what_peft_loses_is_refused_by_name"),
        *_of(_MERGE, "biases_and_tokens_do_not_fit_a_plain_adapter"))),
    Promise("an inherited PiSSA or OLoRA changes the base again", (
        *_of(_WEIGHTED, "what_peft_loses_is_refused_by_name"),
        *_of(_MERGE, "two_kinds_into_a_model", "what_cannot_be_found_from_the_base_is_refused"))),
    Promise("KaSA truncates the base again, with random diagonals", _of(
        _CATALOG, "what_cannot_be_merged_right_is_named")),
    Promise("layer_replication is inherited, and the layers are copied again", (
        *_of(_WEIGHTED, "what_peft_loses_is_refused_by_name"),
        *_of(_FOLD, "replicated_layers_beside_others_are_refused"),
        *_of("merger/adapters/test_fold", "a_fold_says_what_the_unmerged_model_says"))),
    Promise("fewer weights than adapters leave adapters out", _of(_WEIGHTED, "a_weight_for_every_adapter")),
    Promise("a name that is taken returns in silence, also after a failure", _of(
        "jobs/test_exit_codes", "already_done", "another_merge_is_there", "a_failed_run_is_resumed")),
    Promise("layers_to_transform and exclude_modules of the first drop layers of the others", _of(
        _WEIGHTED, "layers_to_transform_of_the_first_adapter_drops_no_layer_of_others")),
    Promise("a merge of rank patterns cannot be loaded again", _of(_WEIGHTED, "merges_of_rank_patterns_load_again")),
    Promise("an svd_rank above the layer's size cannot be loaded again", _of(
        _WEIGHTED, "svd_rank_above_the_layer_s_own_is_padded_and_loads")),
    Promise("DARE at density 0 gives NaN", _of(_WEIGHTED, "dare_that_keeps_nothing_is_refused")),
    Promise("a bfloat16 base rounds a cat of float32 adapters", _of(
        _WEIGHTED, "a_bfloat16_base_takes_no_digits_from_cat")),
    Promise("out_proj of MultiheadAttention is counted twice", _of(_EXPERTS, "attention_of_torch")),
    Promise("aLoRA sources are combined, with the first's invocation tokens", _of(
        _CATALOG, "what_cannot_be_merged_right_is_named")),
    Promise("types on factors have cross terms of one adapter's B with another's A", _of(
        "merger/methods/test_adapters", "concat_is_exact", "other_factors_of_the_same_delta_change_nothing")),
)  # fmt: skip
"""What add_weighted_adapter gets wrong in silence."""

MERGEKIT: Final[tuple[Promise, ...]] = (
    Promise("codes of FP8 and 4-bit weights are merged as numbers and written without scales", (
        *_of("merger/quantization/test_fp8", "weights_are_codes_times_scales", "a_dense_fold"),
        *_of("merger/quantization/test_bnb", "a_quantised_and_a_dense_model_merge"),
        *_of("merger/quantization/test_deepseek", "two_models_merge_in_their_own_layout"))),
    Promise("tensors outside the table of an architecture are dropped (biases of attention_bias)", _of(
        _FAMILIES, "two_models_are_merged", "an_adapter_is_folded")),
    Promise("tensors that no class loads are dropped", (
        *_of(_FAN_IN, "tensors_that_no_class_loads_are_merged",
             "a_tensor_that_one_source_lacks_is_refused_with_both_sides"),
        *_of("merger/quantization/test_deepseek", "a_fold_keeps_layout_and_names"))),
    Promise("a stale model.safetensors is loaded instead of new shards", (
        *_of("merger/formats/test_checkpoint", "a_single_file_and_an_index_of_others_are_refused"),
        *_of("jobs/test_exit_codes", "a_foreign_folder"),
        *_of("merger/test_exists", "files_that_the_new_merge_has_not_are_removed"))),
    Promise("unknown keys are ignored at every level", (
        *_of(_LOAD, "keys_that_mergekit_ignores_are_warnings", "slips_are_errors_also_in_mergekits_files"),
        *_of("jobs/test_exit_codes", "an_unknown_key"))),
    Promise("weight outside parameters, residual_weight and layer_range in models are ignored", _of(
        _LOAD, "keys_that_mergekit_ignores_are_warnings")),
    Promise("a negative layer_range writes a model of a negative count of layers", (
        *_of(_LOAD, "slices_refused"), *_of(_REFUSALS, "layers_that_are_not_there"))),
    Promise("without base_model the donor of config and tokenizer differs from run to run", _of(
        _FAN_IN, "config_and_companions_are_the_first_models_whatever_comes_after")),
    Promise("weights that sum to zero give NaN or Inf", _of(
        "merger/planning/test_plan", "weights_that_cancel_are_refused")),
    Promise("a model that is listed twice counts once, with its first weight", _of(
        _FAN_IN, "a_model_that_is_listed_twice_is_refused")),
    Promise("a model of another shape is skipped, or cut to the common corner", _of(
        "jobs/test_exit_codes", "models_of_two_shapes")),
    Promise("arcee_fusion and ramplus_tl write float32 whatever the dtype", _of(
        _FAN_IN, "every_method_writes_the_dtype_of_its_sources")),
    Promise("arithmetic is done in bfloat16", (
        *_of(_MODELS, "everything_is_rounded_once"), *_of(_PARITY, "bfloat16_is_rounded_once"))),
    Promise("mixed dtypes are written in one and named another in config.json", _of(
        _MODELS, "mixed_dtypes_take_the_widest")),
    Promise("a head of its own is written under a config that ties it", (
        *_of(_REFUSALS, "a_stored_head_that_changes_is_untied"),
        *_of(_PARITY, "a_tied_and_an_untied_model_give_a_head_of_its_own"))),
    Promise("experts are packed on loading, so that statistics and names change", (
        *_of(_FAMILIES, "two_models_are_merged"),
        *_of("mergekit/test_assembly", "models_of_experts_merge_as_in_mergekit"))),
    Promise("what follows the layers takes its sources from one slice and their count from another", _of(
        _FAN_IN, "what_follows_the_layers_comes_from_the_last_slice")),
    Promise("generation_config.json is lost where a tokenizer is built", _of(
        _WORDS, "configs_name_tokens_by_their_new_ids")),
    Promise("a literal chat template fails and leaves the output without a tokenizer", _of(
        _WORDS, "a_chat_template_is_written_once", "an_unknown_template_is_refused")),
    Promise("vocabularies of other sizes are cut while config.json keeps the old size", (
        *_of("jobs/test_exit_codes", "models_of_two_shapes"), *_of(_WORDS, "a_union_gives_each_token_its_row"))),
    Promise("padded vocabularies lose rows, or end in a KeyError", _of(
        _WORDS, "padding_rows_stay_unless_a_multiple_is_asked", "tokens_without_rows_are_left_out",
        "the_vocabulary_of_a_named_model")),
    Promise("sce weighs sources uniformly below an absolute guard", _of(
        "merger/methods/test_consensus", "sce_says_where_it_could_not_weigh_the_sources")),
    Promise("arcee_fusion draws its quartiles from a random sample", _of(
        "merger/methods/test_fusion", "quartiles_are_exact_over_many_tiles")),
    Promise("breadcrumbs zero small tensors (before 0.1.5)", _of(_SPARSE, "exactly_k_survive_the_band")),
    Promise("della ends at rows of one element", _of(_SPARSE, "rows_of_one_element_are_kept_at_the_density")),
    Promise("base+adapter is folded and rounded, and an interrupted fold is trusted the next time", (
        *_of(_LOADS, "models_of_adapters"), *_of("merger/adapters/test_cuts", "a_half_precision_base_is_rounded_once"),
        *_of("jobs/test_exit_codes", "a_failed_run_is_resumed"))),
    Promise("paths with + or @ cannot be written", _of(
        "merger/manifest/test_references", "existing_path_with_plus_wins", "object_form")),
    Promise("architectures that no table knows are refused, or lose tensors", _of(
        _FAMILIES, "two_models_are_merged", "an_adapter_is_folded")),
    Promise("errors that the headers could have told come after the downloads", (
        *_of("merger/planning/test_plan", "planning_and_inspecting_read_headers_only",
             "everything_wrong_is_said_at_once"),
        *_of("jobs/test_exit_codes", "every_problem_is_told_at_once"))),
    Promise("an extracted LoRA of an unchanged module has rank 0 and does not load", (
        *_of("merger/test_settle", "a_module_that_does_not_change_has_rank_one"),
        *_of("merger/test_extract", "an_energy_gives_each_pair_the_least_rank_that_keeps_it"))),
    Promise("integer buffers are averaged like weights", _of(
        _FAN_IN, "integer_tensors_are_copied_where_they_agree_and_refused_where_not")),
    Promise("masks follow the order of the run and the process", _of(
        _MODELS, "the_seed_and_the_position_decide_what_is_dropped")),
)  # fmt: skip
"""What mergekit loses or changes in silence, and what its users meet."""

TRAPS: Final[tuple[Promise, ...]] = (
    Promise("sums of factors for the factors of a sum", _of(
        "merger/methods/test_adapters", "concat_is_exact", "svd_is_the_best_of_its_rank")),
    Promise("a negative weight whose sign cancels on both factors", _of(_WEIGHTED, "linear", "cat")),
    Promise("results that change with a rotation of the factors", _of(
        "merger/methods/test_adapters", "any_gauge_changes_nothing")),
    Promise("alpha / r multiplied twice in svd", _of(_WEIGHTED, "svd", "svd_of_different_ranks")),
    Promise("rsLoRA inherited by the merge", _of(_WEIGHTED, "rslora_first_is_scaled_once")),
    Promise("a rescale of DARE that does nothing", _of(_MODELS, "dare")),
    Promise("DARE at density 0", _of(_WEIGHTED, "dare_that_keeps_nothing_is_refused")),
    Promise("a config whose rank is not that of its tensors", (
        *_of("jobs/test_exit_codes", "a_rank_that_differs_from_its_config"),
        *_of(_WEIGHTED, "merges_of_rank_patterns_load_again"))),
    Promise("DoRA without its magnitudes", (
        *_of(_CATALOG, "what_cannot_be_merged_right_is_named"),
        *_of("merger/adapters/test_fold", "a_fold_says_what_the_unmerged_model_says"))),
    Promise("no density, an output that exists, other ranks", (
        *_of(_WEIGHTED, "a_density_in_bounds_is_demanded", "factors_of_different_ranks_are_refused"),
        *_of("jobs/test_exit_codes", "another_merge_is_there"))),
    Promise("trims by tensor and by model, which no tool tells apart", _of(
        "merger/test_protocol", "model_wide_ties_is_ties_of_the_concatenated_model", "model_wide_ties_of_adapters")),
    Promise("how many elements a density keeps, and of tiny tensors", (
        *_of("merger/kernels/test_selection", "a_density_is_truncated"),
        *_of(_MODELS, "exactly_k_survive_and_of_equals_the_first", "empty_tensors_and_scalars"))),
    Promise("equal magnitudes at a cut", (
        *_of(_MODELS, "exactly_k_survive_and_of_equals_the_first"),
        *_of(_PARITY, "ties_of_bfloat16_differ_only_where_magnitudes_are_equal"))),
    Promise("election before or after the weights, division by weights or counts", (
        *_of(_MODELS, "the_steps_of_the_ties_paper", "ties"), *_of(_LOADS, "models_of_adapters"))),
    Promise("the sign of zero", (*_of(_MODELS, "ties"), *_of(_WEIGHTED, "ties"))),
    Promise("rescaling to the L1 norm where the paper divides", (
        *_of(_SPARSE, "divided_by_their_own_probability_the_mean_is_the_delta", "the_l1_norm_is_restored",
             "rows_of_one_element_are_kept_at_the_density"), *_of(_MODELS, "dare"))),
    Promise("a band that keeps nothing of small tensors", _of(_SPARSE, "breadcrumbs", "exactly_k_survive_the_band")),
    Promise("norms of half-precision tensors that overflow", (
        *_of("merger/methods/test_gram", "huge_and_tiny_values_keep_their_scale"),
        *_of(_MODELS, "an_overflow_of_the_arithmetic_ends_the_merge"))),
    Promise("arithmetic in bfloat16", _of(_MODELS, "everything_is_rounded_once")),
    Promise("a rounding after each adapter", _of(
        _FOLD, "several_adapters_are_rounded_once", "several_adapters_with_rounded_deltas")),
    Promise("a delta rounded to the adapter's dtype here and the base's there", _of(_FOLD, "the_two_roundings_differ")),
    Promise("a QLoRA adapter on a base that it was not trained on", _of(
        "merger/quantization/test_grid", "a_fold_on_the_grid_is_the_fold_into_the_quantised_base",
        "the_report_says_how_far_the_base_moved_beside_the_delta",
        "an_adapter_that_names_4_bits_over_a_dense_base_is_a_warning")),
    Promise("a delta lost in quantising again", _of(
        "merger/quantization/test_keep", "what_cannot_be_written_so_is_refused_with_a_way_out",
        "keep_writes_touched_tensors_back_and_copies_the_rest")),
    Promise("tied embeddings: a trained head that is tied again, or an embedding that changes with its head", (
        *_of(_FOLD, "lm_head_of_a_tied_model_is_untied", "a_tied_model_stays_tied_when_its_head_is_left_alone"),
        *_of(_LOADS, "an_untied_head_loads"))),
    Promise("other tokens at one row, rows without tokens", (
        *_of(_REFUSALS, "tokens_that_changed_places"),
        *_of(_WORDS, "rows_move_with_their_tokens", "rows_of_owners_are_their_mean_whatever_the_method",
             "padding_rows_stay_unless_a_multiple_is_asked"),
        *_of("jobs/test_real_tokenizer", "each_token_keeps_its_row_and_generates"))),
    Promise("a head that some have, trained tokens, resized embeddings", (
        *_of(_WORDS, "what_is_tied_is_read_as_embeddings"),
        *_of(_MERGE, "resized_embeddings_come_with_their_vocabulary", "biases_and_tokens_do_not_fit_a_plain_adapter"))),
    Promise("packed experts: layouts, versions and names", (
        *_of(_EXPERTS, "packed_experts", "square_experts_of_an_unnamed_version_need_a_word",
             "experts_of_peft_before_0_19", "experts_laid_out_one_after_another",
             "experts_named_one_by_one_on_a_packed_checkpoint", "another_number_of_experts_is_refused"),
        *_of(_FAMILIES, "an_adapter_is_folded"))),
    Promise("adapters of experts that cannot be merged with weights", _of(_EXPERTS, "packed_experts")),
    Promise("routers that are averaged", _of(
        _FAN_IN, "routers_that_are_mixed_are_told_and_a_filter_keeps_one", "a_dense_model_has_no_routers")),
    Promise("norms, rotary tables and integer buffers treated as matrices", (
        *_of(_REFUSALS, "rotary_tables_are_copied_when_they_are_equal", "rope_settings_are_not_mixed"),
        *_of(_FAN_IN, "integer_tensors_are_copied_where_they_agree_and_refused_where_not"),
        *_of("merger/methods/test_spectral", "what_is_no_matrix_is_averaged_or_summed"))),
    Promise("layers that lie transposed, embeddings, convolutions", (
        *_of(_MERGE, "embeddings_and_conv1d_adapters_stay_low_rank", "peft_types_on_convolutions_and_embeddings"),
        *_of("merger/adapters/test_fold", "a_fold_says_what_the_unmerged_model_says"))),
    Promise("adapters that began in a changed base", _of(
        _MERGE, "an_adapter_with_the_one_before_training", "what_cannot_be_found_from_the_base_is_refused",
        "initial_for_an_adapter_that_left_the_base_alone_is_refused")),
    Promise("copied and chosen layers, patterns, biases, modules that some lack", (
        *_of(_WEIGHTED, "patterns"), *_of(_LOADS, "adapters_with_unlike_modules_and_ranks"),
        *_of("merger/methods/test_adapters", "a_module_that_an_adapter_lacks_is_zero_and_counts"),
        *_of("merger/adapters/test_fold", "a_fold_says_what_the_unmerged_model_says"))),
    Promise("prefixes that match nothing, so that the base is served", (
        *_of(_RENAMES, "some_that_fit_nothing_are_refused_with_both_sides", "an_old_adapter_of_a_moved_language_model",
             "two_ways_to_fit_are_no_way"), *_of("merger/adapters/test_serving", "a_wrong_prefix_serves_the_base"))),
    Promise("random numbers that follow the order of work", (
        *_of(_MODELS, "the_seed_and_the_position_decide_what_is_dropped"),
        *_of("merger/kernels/test_hashing", "any_cut_is_the_whole"),
        *_of("conformance/test_executors", "workers_and_memory_change_no_byte", "the_order_of_units_changes_no_byte"))),
    Promise("null spaces and free signs of singular vectors", _of(
        "merger/methods/test_spectral", "deltas_that_cancel_leave_no_noise",
        "the_published_forms_on_low_rank_do_not", "any_gauge_gives_the_same")),
    Promise("an SVD in half precision, or of the full square", (
        *_of("merger/methods/test_adapters", "svd_is_the_best_of_its_rank", "signs_and_order_of_an_svd_are_fixed"),
        *_of("merger/methods/test_combination", "no_dense_delta_is_planned_for"))),
    Promise("adapters of another base, or another revision of it", (
        *_of(_REFUSALS, "another_base_than_the_adapters_name_is_reported"),
        *_of(_FAN_IN, "adapters_of_another_revision_of_the_base_are_told"))),
    Promise("a generation config or chat template that is lost", (
        *_of(_FOLD, "config_and_generation_config_stay"),
        *_of(_FAN_IN, "config_and_companions_are_the_first_models_whatever_comes_after"))),
    Promise("a crashed run that is taken for a result", (
        *_of("cluster/test_faults", "a_death_at_any_change", "kill_9_at_random_moments"),
        *_of("jobs/test_exit_codes", "a_failed_run_is_resumed"))),
    Promise("an adapter that was poisoned, or diverged, and decides the merge", _of(
        "merger/test_outliers", "a_source_that_is_far_larger_is_told", "a_source_that_lies_in_one_module_is_told",
        "the_report_says_how_large_each_source_is")),
    Promise("tensors that travel through Ray, results in the wrong place", (
        *_of("cluster/test_run", "nothing_goes_through_the_object_store"),
        *_of("conformance/test_executors", "actors_give_the_same_bytes"))),
)  # fmt: skip
"""Traps of the field, each met by several tools."""

EVERY: Final = {"PEFT": PEFT, "mergekit": MERGEKIT, "the field": TRAPS}
