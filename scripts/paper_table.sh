# Sourced by the scripts of tables 3 and 4: `source scripts/paper_table.sh TABLE OUTPUT.json "$@"` measures that table of evaluation/tables.py.
#
# The script's own arguments are MODEL DRAFT_ADAPTER SHALLOW_ADAPTER... [-- FLAGS OF python -m evaluation.tables]. Without paths it is the
# default model with its adapters, its flash imitated at 100 MB/s, so that streaming and not arithmetic sets the pace, as at 7B.

_cats_paper_table() {
    local table=$1 output=$2 paths=() flags=()
    shift 2
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        paths+=("$1")
        shift
    done
    flags=("${@:2}")
    if [ ${#paths[@]} -eq 0 ]; then
        flags=(--flash-bandwidth 100MB/s ${flags[@]+"${flags[@]}"})
    elif [ ${#paths[@]} -lt 3 ]; then
        printf 'error: give a model, a draft adapter and one or more shallow adapters, or nothing for the default model.\n' >&2
        return 2
    else
        flags=(--model-path "${paths[0]}" --draft-adapter-path "${paths[1]}" --shallow-adapter-paths "${paths[@]:2}" ${flags[@]+"${flags[@]}"})
    fi
    python -m evaluation.tables "$table" --output "$output" "${flags[@]}"
}

_cats_paper_table "$@"
