# SPDX-License-Identifier: Apache-2.0
"""Builds all parts of one rank's engine: communicators, weights, KV cache, KV transfer. Collective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from dynamo_mpi.common.errors import EngineError
from dynamo_mpi.common.host_address import host_address
from dynamo_mpi.engines.protocol import EngineLimits
from dynamo_mpi.engines.reference.collectives import (
    Collectives,
    Consensus,
    MpiCollectives,
    MpiConsensus,
    MpiPipeline,
    Pipeline,
    SingleRank,
    SingleRankConsensus,
    SingleStage,
)
from dynamo_mpi.engines.reference.config import ReferenceConfig
from dynamo_mpi.engines.reference.kv_descriptor import CacheLayout, KvShard, RankShard
from dynamo_mpi.engines.reference.kv_server import KvServer, KvStore
from dynamo_mpi.engines.reference.kv_transfer import KvTransferScheduler, KvTransferWorker
from dynamo_mpi.engines.reference.scheduler import Scheduler
from dynamo_mpi.engines.reference.shape import share_of, stage_of
from dynamo_mpi.engines.reference.steps import Command, StepChannel
from dynamo_mpi.engines.reference.transformer import Transformer
from dynamo_mpi.engines.reference.weights import ModelFile, load_weights, open_model

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass(frozen=True)
class Loaded:
    """One rank's engine. ``channel`` is None in a world of one rank, ``kv_scheduler`` on all ranks but 0."""

    transformer: Transformer
    scheduler: Scheduler
    channel: StepChannel | None
    limits: EngineLimits
    vocab_size: int
    kv_worker: KvTransferWorker
    kv_scheduler: KvTransferScheduler | None


def load_parts(communicator: MPI.Intracomm | None, config: ReferenceConfig, rank: int) -> Loaded:
    """Map this rank's shard of the weights and allocate its KV cache. Collective.

    Raises:
        ModelNotFoundError: the model can't be read, or is not one this engine computes.
        LayoutError: the model can't be split like this.
        ConfigFileError: ``max_seq_len`` is beyond the model's context.
        UsageError: this host has no address in the KV network.
        EngineError: the memory is too small, or KV can't be served.
    """
    # first, because these are collective: if a rank failed before them, the others would wait
    comm = None if communicator is None or communicator.Get_size() == 1 else communicator.Dup()
    stage = _stage_of(comm, config, rank)
    consensus: Consensus = SingleRankConsensus() if comm is None else MpiConsensus(comm)
    serving = _Serving(config, consensus) if config.serves_kv else None
    model = open_model(config.model_dir)
    try:
        weights = load_weights(model, rank, config.tp_size, config.pp_size)
        context = config.context_length(weights.shape.max_position_embeddings)
        pipeline: Pipeline = (
            SingleStage() if comm is None or stage is comm else MpiPipeline(comm, config.tp_size, weights.stage)
        )
        collectives: Collectives = SingleRank() if stage is None or config.tp_size == 1 else MpiCollectives(stage)
        transformer = Transformer(weights, collectives, pipeline, config.tp_size, config.max_batch_size, context)
    except MemoryError as error:
        raise EngineError(
            f"the memory is too small for the model and a KV cache of {config.max_batch_size} sequences",
            expected="room for this rank's weights and KV cache",
            fix="lower max_batch_size or max_seq_len in the engine config, or use more ranks",
        ) from error
    channel = None if comm is None else StepChannel(comm)
    if serving is not None:
        # as large as the KV cache itself
        serving.server.store.most_tokens = config.max_batch_size * context
    kv_worker = KvTransferWorker(
        rank,
        KvShard(weights.stage.layers, weights.share.kv_heads),
        transformer.cache,
        consensus,
        config.kv_pull_seconds,
        None if serving is None else serving.server,
    )
    return Loaded(
        transformer=transformer,
        scheduler=Scheduler(config.max_batch_size, config.max_num_tokens, context),
        channel=channel,
        limits=EngineLimits(
            context_length=context,
            max_batch_size=config.max_batch_size,
            max_num_tokens=config.max_num_tokens,
            kv_block_size=config.kv_block_size,
            total_kv_blocks=config.max_batch_size * -(-context // config.kv_block_size),
        ),
        vocab_size=weights.shape.vocab_size,
        kv_worker=kv_worker,
        kv_scheduler=_kv_scheduler(config, model, channel, kv_worker, serving) if rank == 0 else None,
    )


class _Serving:
    """A prefill rank's server. Collective: all ranks exchange their addresses before a rank that can't serve raises.

    Raises:
        UsageError: this host has no such address.
        EngineError: it can't listen there.
    """

    def __init__(self, config: ReferenceConfig, consensus: Consensus) -> None:
        store = KvStore(0, config.kv_keep_seconds)
        place = ""
        try:
            self.server = KvServer(store, host_address(config.kv_network, "--kv-network / DYN_MPI_KV_NETWORK"))
            host, port = self.server.address
            place = f"{host}:{port}"
        except OSError as error:
            raise EngineError(
                f"KV can't be served: {error}",
                expected="an address of this host at which it can listen",
                fix="set --kv-network / DYN_MPI_KV_NETWORK to an interface or network of every rank's host",
            ) from None
        finally:
            self.places = consensus.texts(place)


def _kv_scheduler(
    config: ReferenceConfig,
    model: ModelFile,
    channel: StepChannel | None,
    kv_worker: KvTransferWorker,
    serving: _Serving | None,
) -> KvTransferScheduler:
    shape, ranks = model.shape, []
    for rank, place in enumerate([] if serving is None else serving.places):
        host, _, port = place.rpartition(":")
        layers = stage_of(shape.num_hidden_layers, rank, config.tp_size, config.pp_size).layers
        heads = share_of(shape, rank % config.tp_size, config.tp_size).kv_heads
        # a rank without a port has failed, so this engine doesn't start
        ranks.append(RankShard(host, int(port or 0), KvShard(layers, heads)))
    layout = CacheLayout(
        model=model.fingerprint,
        layers=shape.num_hidden_layers,
        kv_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        block_size=config.kv_block_size,
    )

    def send(command: Command) -> None:
        if channel is not None:
            channel.send_command(command)

    return KvTransferScheduler(
        send,
        kv_worker,
        layout,
        tuple(ranks),
        (config.tp_size, config.pp_size),
        config.kv_pull_seconds,
    )


def _stage_of(comm: MPI.Intracomm | None, config: ReferenceConfig, rank: int) -> MPI.Intracomm | None:
    """Return the communicator of this rank's stage; ``comm`` itself if there is only one stage. Collective."""
    if comm is None or config.pp_size == 1:
        return comm
    return cast("MPI.Intracomm", comm.Split(rank // config.tp_size, rank))
