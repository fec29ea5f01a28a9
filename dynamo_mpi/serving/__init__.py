# SPDX-License-Identifier: Apache-2.0
"""The worker as Dynamo sees it: a registered model and an endpoint that turns requests into token streams."""
