# Sourced by the scripts of tables 3 and 4: `source scripts/paper_table.sh TABLE OUTPUT.json "$@"` measures that table of evaluation/tables.py.
#
# The script's own arguments are MODEL DRAFT_ADAPTER SHALLOW_ADAPTER... [-- FLAGS OF python -m evaluation.tables]. Without paths it is the
# embedded model, its flash imitated at 50 MB/s, so that streaming and not arithmetic sets the pace, as at 7B.

_cats_paper_table() {
    local table=$1 output=$2 paths=() flags=()
    shift 2
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        paths+=("$1")
        shift
    done
    flags=("${@:2}")
    if [ ${#paths[@]} -eq 0 ]; then
        paths=(data/tiny data/tiny/adapters/draft_exit2 data/tiny/adapters/shallow_exit{4,6,8})
        flags=(--flash-bandwidth 50MB/s --dtype float32 ${flags[@]+"${flags[@]}"})
    elif [ ${#paths[@]} -lt 3 ]; then
        printf 'error: give a model, a draft adapter and one or more shallow adapters, or nothing for the embedded model.\n' >&2
        return 2
    fi
    python -m evaluation.tables "$table" --model-path "${paths[0]}" --draft-adapter-path "${paths[1]}" \
        --shallow-adapter-paths "${paths[@]:2}" --output "$output" ${flags[@]+"${flags[@]}"}
}

_cats_paper_table "$@"
