# Sourced by the train and eval scripts: `launch SCRIPT FLAGS…` under accelerate with the settings those scripts set.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

launch() {
    local options=(--num_processes "$PROCESSES" --num_machines "${MACHINES:-1}" --mixed_precision "$PRECISION" --dynamo_backend no)
    if [ "$PROCESSES" -gt 1 ]; then options+=(--multi_gpu); fi
    if [ "${MACHINES:-1}" -gt 1 ]; then
        options+=(--machine_rank "$MACHINE_RANK" --main_process_ip "$MAIN_IP" --main_process_port "${MAIN_PORT:-29500}")
    fi
    accelerate launch "${options[@]}" "$@"
}
