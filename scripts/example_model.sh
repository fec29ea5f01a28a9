# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
#
# To be sourced by srun_disaggregated.sh and srun_aggregated.sh, with their arguments: Llama-4-Maverick, unless an engine config of another model
# or a model is given; and images for a Llama-4, which needs MODALITY=multimodal for them.

if [[ " $* " != *" --model"* ]]; then
    if [[ -z ${ENGINE_CONFIG:-}${PREFILL_ENGINE_CONFIG:-}${DECODE_ENGINE_CONFIG:-} && " $* " != *"engine-config"* ]]; then
        export MODEL_PATH=${MODEL_PATH-meta-llama/Llama-4-Maverick-17B-128E-Instruct}
    fi
    if [[ ${MODEL_PATH:-} =~ [Ll]lama-4 ]]; then
        export MODALITY=${MODALITY:-multimodal}
    fi
fi
