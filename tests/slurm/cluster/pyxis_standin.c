/* SPDX-License-Identifier: Apache-2.0
 *
 * A stand-in for NVIDIA's Pyxis, so that a launcher's container options are really used where no container can run.
 *
 * srun, salloc and sbatch accept Pyxis's options. In a task that asks for an image or a name, --container-mounts become
 * bind mounts in a mount namespace of the task, and --container-workdir a chdir. The image is not unpacked: the root file
 * system stays the host's, and the options are shown in PYXIS_STANDIN_{IMAGE,NAME,MOUNTS}.
 * A mount point that is missing is made, on the host, as there is no image to make it in.
 * As Pyxis does, it refuses mounts and a folder that make no sense, and the task does not start.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <slurm/spank.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

SPANK_PLUGIN(pyxis_standin, 1)

enum option {
	IMAGE, MOUNTS, WORKDIR, NAME, SAVE, ENVIRONMENT, MOUNT_HOME, NO_MOUNT_HOME, REMAP_ROOT, NO_REMAP_ROOT,
	ENTRYPOINT, NO_ENTRYPOINT, ENTRYPOINT_LOG, WRITABLE, READONLY, OPTIONS
};

static const struct { const char *name; int has_value; } known[OPTIONS] = {
	[IMAGE] = { "container-image", 1 },
	[MOUNTS] = { "container-mounts", 1 },
	[WORKDIR] = { "container-workdir", 1 },
	[NAME] = { "container-name", 1 },
	[SAVE] = { "container-save", 1 },
	[ENVIRONMENT] = { "container-env", 1 },
	[MOUNT_HOME] = { "container-mount-home", 0 },
	[NO_MOUNT_HOME] = { "no-container-mount-home", 0 },
	[REMAP_ROOT] = { "container-remap-root", 0 },
	[NO_REMAP_ROOT] = { "no-container-remap-root", 0 },
	[ENTRYPOINT] = { "container-entrypoint", 0 },
	[NO_ENTRYPOINT] = { "no-container-entrypoint", 0 },
	[ENTRYPOINT_LOG] = { "container-entrypoint-log", 0 },
	[WRITABLE] = { "container-writable", 0 },
	[READONLY] = { "container-readonly", 0 },
};

static char *value[OPTIONS];

static int take_option(int option, const char *argument, int remote)
{
	(void) remote;
	free(value[option]);
	value[option] = strdup(argument ? argument : "1");
	return value[option] ? 0 : -1;
}

static int in_container(void)
{
	return value[IMAGE] || value[NAME];
}

int slurm_spank_init(spank_t spank, int argc, char **argv)
{
	(void) argc;
	(void) argv;
	for (int i = 0; i < OPTIONS; i++) {
		struct spank_option option = {
			.name = (char *) known[i].name,
			.arginfo = known[i].has_value ? (char *) "VALUE" : NULL,
			.usage = (char *) "[stand-in] as Pyxis's option of this name",
			.has_arg = known[i].has_value,
			.val = i,
			.cb = take_option,
		};
		if (spank_option_register(spank, &option) != ESPANK_SUCCESS)
			return -1;
	}
	return 0;
}

/* Make what a bind mount needs to be mounted on, parents included: Pyxis mounts on paths that the image lacks. */
static void make_mount_point(char *path, int is_folder)
{
	for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
		*slash = '\0';
		mkdir(path, 0755);
		*slash = '/';
	}
	if (is_folder) {
		mkdir(path, 0755);
	} else {
		int file = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0644);
		if (file >= 0)
			close(file);
	}
}

/* One SOURCE[:TARGET[:FLAG[+FLAG]]]; ro is the flag that is obeyed. */
static int bind_mount(char *specification)
{
	char *rest = specification;
	char *source = strsep(&rest, ":");
	char *target = strsep(&rest, ":");
	struct stat status;

	if (!target)
		target = source;
	if (source[0] != '/' || target[0] != '/') {
		slurm_error("pyxis stand-in: --container-mounts needs absolute paths: %s:%s", source, target);
		return -1;
	}
	if (stat(source, &status)) {
		slurm_error("pyxis stand-in: no such mount source: %s", source);
		return -1;
	}
	if (strcmp(source, target))
		make_mount_point(target, S_ISDIR(status.st_mode));
	if (mount(source, target, NULL, MS_BIND | MS_REC, NULL)) {
		slurm_error("pyxis stand-in: cannot mount %s on %s: %m", source, target);
		return -1;
	}
	if (rest && strstr(rest, "ro") && mount(NULL, target, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL)) {
		slurm_error("pyxis stand-in: cannot make %s read-only: %m", target);
		return -1;
	}
	return 0;
}

/* As root, before the task's user is taken on. */
int slurm_spank_task_init_privileged(spank_t spank, int argc, char **argv)
{
	(void) argc;
	(void) argv;
	if (!in_container())
		return 0;
	if (value[IMAGE])
		spank_setenv(spank, "PYXIS_STANDIN_IMAGE", value[IMAGE], 1);
	if (value[NAME])
		spank_setenv(spank, "PYXIS_STANDIN_NAME", value[NAME], 1);
	if (!value[MOUNTS])
		return 0;
	spank_setenv(spank, "PYXIS_STANDIN_MOUNTS", value[MOUNTS], 1);
	if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL)) {
		slurm_error("pyxis stand-in: no mount namespace: %m");
		return -1;
	}
	char *specifications = strdup(value[MOUNTS]);
	char *rest = specifications;
	int result = specifications ? 0 : -1;
	for (char *one = strsep(&rest, ","); one && !result; one = strsep(&rest, ","))
		result = bind_mount(one);
	free(specifications);
	return result;
}

/* Not in the privileged hook: slurmstepd changes to the step's own folder after that one. */
int slurm_spank_task_init(spank_t spank, int argc, char **argv)
{
	(void) argc;
	(void) argv;
	if (!in_container() || !value[WORKDIR])
		return 0;
	if (chdir(value[WORKDIR])) {
		slurm_error("pyxis stand-in: no --container-workdir %s: %m", value[WORKDIR]);
		return -1;
	}
	spank_setenv(spank, "PWD", value[WORKDIR], 1);
	return 0;
}
