# SPDX-License-Identifier: Apache-2.0
"""The operator's command ``dynamo-mpi VERB``: one module per verb, loaded only when it is asked for."""
