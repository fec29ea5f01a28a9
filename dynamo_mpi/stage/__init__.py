# SPDX-License-Identifier: Apache-2.0
"""Copies the checkpoint to every node once, reading the shared file system once for all of them.

digest      of an extent: fast, against damage
manifest    the files of a model, and the extents in which they are copied
site        where to stage if the user has named no folder
plan        what to stage, the same on all ranks
file_system what the system knows of a file system and its files
store       the copies on this node: locks, room, what is used, what is removed
open_files  the files of a model, or of a copy
partial     a copy that isn't complete: written, verified, then published as a whole
pool        which node reads which extent
wire        the messages between the nodes' helpers
coordinator the first node's server: hands out extents, and ends staging for all nodes together
member      what every node does: sends extents to its successor; a node that had a copy feeds the others
transfer    the part of a node that makes a copy: its readers, and its streams from its predecessor
helper      the process of a node that does all this
session     a rank's side: all ranks start, await and judge the staging together

And keeps compile caches: each rank has folders of its own, seeded from an archive on the shared file system.

compile_caches  the libraries, and the variable that each honours
cache_key       what makes an archive valid for a worker
cache_archive   one rank's files as one file
cache_store     the archives on the shared file system
cache_helper    the process that reads and writes them
cache_call      requests to it, and what is answered if one can't be done
cache_folder    where a rank has its caches on its node
cache_session   a rank's side
"""
