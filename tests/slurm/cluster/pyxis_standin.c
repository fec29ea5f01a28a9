/* SPDX-License-Identifier: Apache-2.0
 *
 * A stand-in for NVIDIA's Pyxis and enroot, so that a launcher's container options are really used where no container can run.
 * It behaves as Pyxis 0.24 and enroot 4.1 do with their default settings (args.c, pyxis_slurmstepd.c, runtime.sh and the
 * hooks 50-slurm-pmi.sh and 50-slurm-pytorch.sh there), but for this:
 *
 * - An image is a text file of NAME=VALUE, the image's variables. What it holds else is the host's own root file system: an
 *   overlay of it, read-only without --container-writable, and in any case without effect on the host.
 * - There is no registry: what isn't a path can't be imported.
 * - --container-name gets a container of its own all the same, and nothing is saved.
 *
 * Arguments in plugstack.conf: spool=PREFIX, slurmd's spool folder without the node's name, of which enroot's hook mounts a
 * part; image=FOLDER, a folder that images have although it isn't on the root file system; remap_root=1, as ENROOT_REMAP_ROOT.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <slurm/spank.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

SPANK_PLUGIN(pyxis, 1)

#define MOST 64
#ifndef ROOT
#error "-DROOT: a folder to mount an image's root file system on, in a mount namespace of its own"
#endif

enum option { IMAGE, MOUNTS, WORKDIR, NAME, SAVE, ENVIRONMENT, HOME, REMAP, ENTRYPOINT, ENTRYPOINT_LOG, WRITABLE, OPTIONS };

/* `is` is what a switch means; for options with a value it is -1. */
static const struct { const char *name; enum option option; int is; } known[] = {
	{ "container-image", IMAGE, -1 },
	{ "container-mounts", MOUNTS, -1 },
	{ "container-workdir", WORKDIR, -1 },
	{ "container-name", NAME, -1 },
	{ "container-save", SAVE, -1 },
	{ "container-env", ENVIRONMENT, -1 },
	{ "container-mount-home", HOME, 1 },
	{ "no-container-mount-home", HOME, 0 },
	{ "container-remap-root", REMAP, 1 },
	{ "no-container-remap-root", REMAP, 0 },
	{ "container-entrypoint", ENTRYPOINT, 1 },
	{ "no-container-entrypoint", ENTRYPOINT, 0 },
	{ "container-entrypoint-log", ENTRYPOINT_LOG, 1 },
	{ "container-writable", WRITABLE, 1 },
	{ "container-readonly", WRITABLE, 0 },
};
#define KNOWN (sizeof known / sizeof *known)

static char *value[OPTIONS];
static int is_set[OPTIONS];
static char *variables[MOST]; /* of the image */
static const char *lent[MOST], *spool;
static int remaps_by_default;
static int namespace_file = -1;
static char cause[512], enroot_log[512];

static int fails(const char *what, const char *name)
{
	slurm_error("pyxis: %s%s", what, name);
	return -1;
}

static int is_path(const char *text)
{
	return strspn(text, "./") > 0;
}

/* As in Pyxis, when the option is read: a mount that can't be meant is refused before anything starts. */
static int check_mount(const char *specification)
{
	char *copy = strdup(specification), *rest = copy;
	char *source = strsep(&rest, ":"), *target = rest ? strsep(&rest, ":") : source;
	int result = 0;
	if (!*source || !*target)
		result = fails("--container-mounts: invalid format: ", specification);
	else if (!is_path(source) && strcmp(source, "tmpfs") && strcmp(source, "umount"))
		result = fails("mount source must be a relative path, an absolute path, \"tmpfs\" or \"umount\"", "");
	else if (!is_path(target))
		result = fails("mount target must be a relative path or an absolute path", "");
	if (result)
		slurm_error("pyxis: could not add mount entry: %s:%s", source, target);
	free(copy);
	return result;
}

static int take_value(enum option option, const char *name, const char *argument)
{
	char text[128];
	snprintf(text, sizeof text, "--%s", name);
	if (!argument || !*argument)
		return fails(text, ": argument required");
	if (value[option] && strcmp(value[option], argument) && option != MOUNTS && option != ENVIRONMENT)
		return fails(text, " specified multiple times");
	if (option == MOUNTS) {
		char *copy = strdup(argument), *rest = copy;
		for (char *one = strsep(&rest, ","); one; one = strsep(&rest, ","))
			if (check_mount(one))
				return -1;
		free(copy);
	}
	/* Pyxis adds up; but Slurm gives the node only the last value of an option that is repeated */
	free(value[option]);
	value[option] = strdup(argument);
	return 0;
}

static int take_option(int number, const char *argument, int remote)
{
	(void) remote;
	enum option option = known[number].option;
	if (known[number].is < 0)
		return take_value(option, known[number].name, argument);
	if (is_set[option] && strcmp(value[option], known[number].is ? "1" : "0")) {
		slurm_error("pyxis: both --%s and its opposite were specified", known[number].name);
		return -1;
	}
	is_set[option] = 1;
	value[option] = known[number].is ? "1" : "0";
	return 0;
}

static int is_on(enum option option)
{
	return value[option] && *value[option] == '1';
}

int slurm_spank_init(spank_t spank, int argc, char **argv)
{
	int folders = 0;
	for (int i = 0; i < argc; i++) {
		if (!strncmp(argv[i], "spool=", 6))
			spool = argv[i] + 6;
		else if (!strncmp(argv[i], "image=", 6) && folders < MOST - 1)
			lent[folders++] = argv[i] + 6;
		else if (!strcmp(argv[i], "remap_root=1"))
			remaps_by_default = 1;
	}
	for (size_t i = 0; i < KNOWN; i++) {
		struct spank_option option = {
			.name = (char *) known[i].name,
			.arginfo = known[i].is < 0 ? (char *) "VALUE" : NULL,
			.usage = (char *) "[stand-in] as Pyxis's option of this name",
			.has_arg = known[i].is < 0,
			.val = (int) i,
			.cb = take_option,
		};
		if (spank_option_register(spank, &option) != ESPANK_SUCCESS)
			return -1;
	}
	return 0;
}

/* Is NAME, as in "NAME=VALUE", among those of --container-env, whose values are the user's? */
static int is_named(const char *name)
{
	size_t length = strcspn(name, "=");
	for (const char *one = value[ENVIRONMENT]; one; one = strchr(one, ',') ? strchr(one, ',') + 1 : NULL)
		if (strcspn(one, ",") == length && !strncmp(one, name, length))
			return 1;
	return 0;
}

static const char *of_image(const char *name)
{
	size_t length = strlen(name);
	for (int i = 0; variables[i]; i++)
		if (!strncmp(variables[i], name, length) && variables[i][length] == '=')
			return variables[i] + length + 1;
	return NULL;
}

static int read_image(void)
{
	char line[4096];
	int count = 0;
	FILE *file = is_path(value[IMAGE]) ? fopen(value[IMAGE], "re") : NULL;
	if (!file && is_path(value[IMAGE])) {
		snprintf(cause, sizeof cause, "failed to create container filesystem for image: %s", value[IMAGE]);
		snprintf(enroot_log, sizeof enroot_log, "[ERROR] No such file or directory: %s", value[IMAGE]);
	} else if (!file) {
		snprintf(cause, sizeof cause, "failed to import docker image: %s", value[IMAGE]);
		snprintf(enroot_log, sizeof enroot_log, "[ERROR] Could not process JSON input (there is no registry)");
	}
	while (file && count < MOST - 1 && fgets(line, sizeof line, file)) {
		line[strcspn(line, "\n")] = '\0';
		if (strchr(line, '='))
			variables[count++] = strdup(line);
	}
	if (file)
		fclose(file);
	return file ? 0 : -1;
}

/* Make what a mount needs to be mounted on, parents included. */
static void make_mount_point(char *path, int is_folder)
{
	for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
		*slash = '\0';
		mkdir(path, 0755);
		*slash = '/';
	}
	if (is_folder)
		mkdir(path, 0755);
	else
		close(open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0644));
}

/* Bind SOURCE of the host below the new root, if it is there. */
static int bind_below(const char *source, const char *target, int read_only)
{
	char path[8192];
	struct stat status;
	if (stat(source, &status))
		return -1;
	snprintf(path, sizeof path, "%s/%s", ROOT "/root", target);
	make_mount_point(path, S_ISDIR(status.st_mode));
	if (mount(source, path, NULL, MS_BIND | MS_REC, NULL))
		return -1;
	return read_only ? mount(NULL, path, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL) : 0;
}

/* SOURCE[:TARGET[:FLAG[+FLAG]]], of which ro is obeyed. */
static int user_mount(char *specification)
{
	char *rest = specification, *source = strsep(&rest, ":"), *target = rest ? strsep(&rest, ":") : source;
	if (access(source, F_OK)) {
		snprintf(cause, sizeof cause, "--container-mounts: source path does not exist: %s", source);
		return -1;
	}
	if (bind_below(source, target, rest && strstr(rest, "ro"))) {
		snprintf(cause, sizeof cause, "container start failed with error code: 1");
		snprintf(enroot_log, sizeof enroot_log, "enroot-mount: failed to mount: %.200s: %s", target, strerror(errno));
		return -1;
	}
	return 0;
}

/* In a process of its own: a mount namespace with the image's root file system. */
static int make_root(void)
{
	static const char *const private[] = { "tmp", "run", "var/lock" };
	char path[4096], node[256];
	if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL))
		return -1;
	if (mount("tmpfs", ROOT, "tmpfs", 0, "mode=755") || mkdir(ROOT "/upper", 0755) || mkdir(ROOT "/work", 0755) ||
	    mkdir(ROOT "/root", 0755) ||
	    mount("overlay", ROOT "/root", "overlay", 0, "lowerdir=/,upperdir=" ROOT "/upper,workdir=" ROOT "/work"))
		return -1;
	for (size_t i = 0; i < sizeof private / sizeof *private; i++) {
		snprintf(path, sizeof path, ROOT "/root/%s", private[i]);
		mkdir(path, 0755);
		if (mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"))
			return -1;
	}
	if (bind_below("/proc", "proc", 0) || bind_below("/sys", "sys", 0) || bind_below("/dev", "dev", 0) ||
	    bind_below("/etc/hosts", "etc/hosts", 1))
		return -1;
	for (int i = 0; lent[i]; i++)
		bind_below(lent[i], lent[i], 1);
	if (spool && !gethostname(node, sizeof node)) {
		snprintf(path, sizeof path, "%s%s", spool, node);
		bind_below(path, path, 0);
	}
	/* before the root is read-only, as there may be nothing to mount on */
	char *rest = value[MOUNTS] ? strdup(value[MOUNTS]) : NULL;
	for (char *one = strsep(&rest, ","); one; one = strsep(&rest, ","))
		if (user_mount(one))
			return -1;
	if (!is_on(WRITABLE) && mount(NULL, ROOT "/root", NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL))
		return -1;
	if (chdir(ROOT "/root") || syscall(SYS_pivot_root, ".", ".") || umount2(".", MNT_DETACH))
		return -1;
	return chdir("/");
}

/* As root, in slurmstepd: one container for all tasks of the node. Errors are printed when its tasks start: srun doesn't get earlier ones. */
int slurm_spank_init_post_opt(spank_t spank, int argc, char **argv)
{
	int answer[2], hold[2];
	char path[64];
	pid_t pid;
	(void) spank;
	(void) argc;
	(void) argv;
	if (spank_context() != S_CTX_REMOTE || (!value[IMAGE] && !value[NAME]))
		return 0;
	if (value[IMAGE] && read_image())
		return 0;
	if (pipe2(answer, O_CLOEXEC) || pipe2(hold, O_CLOEXEC) || (pid = fork()) < 0)
		return fails("no process for the container", "");
	if (pid == 0) {
		int code = make_root();
		if (code && !*cause)
			snprintf(cause, sizeof cause, "the stand-in has no container: %s", strerror(errno));
		if (write(answer[1], cause, sizeof cause) > 0 && write(answer[1], enroot_log, sizeof enroot_log) > 0) {
			close(hold[1]);
			(void) !read(hold[0], path, 1);
		}
		_exit(0);
	}
	if (read(answer[0], cause, sizeof cause) == sizeof cause && read(answer[0], enroot_log, sizeof enroot_log) > 0 && !*cause) {
		snprintf(path, sizeof path, "/proc/%d/ns/mnt", pid);
		namespace_file = open(path, O_RDONLY | O_CLOEXEC);
	}
	close(hold[1]);
	waitpid(pid, NULL, 0);
	close(hold[0]);
	close(answer[0]);
	close(answer[1]);
	return 0;
}

/* As root, before the task's user is taken on. */
int slurm_spank_task_init_privileged(spank_t spank, int argc, char **argv)
{
	(void) spank;
	(void) argc;
	(void) argv;
	if (namespace_file >= 0 && setns(namespace_file, CLONE_NEWNS))
		return fails("couldn't join mount namespace", "");
	return 0;
}

static void set_variable(spank_t spank, const char *name, const char *text, int overwrite)
{
	if (!is_named(name) || overwrite > 1)
		spank_setenv(spank, name, text, 1);
}

static void copy_variable(spank_t spank, const char *from, const char *to, int overwrite)
{
	char text[4096];
	if (spank_getenv(spank, from, text, sizeof text) == ESPANK_SUCCESS && (overwrite > 1 || !of_image(to)))
		set_variable(spank, to, text, overwrite);
}

static long number_of(spank_t spank, const char *name)
{
	char text[64];
	return spank_getenv(spank, name, text, sizeof text) == ESPANK_SUCCESS ? atol(text) : 1;
}

/* enroot's hook 50-slurm-pytorch.sh; RANK and LOCAL_RANK are Pyxis's own, and win in any case */
static void set_for_pytorch(spank_t spank)
{
	char port[32];
	copy_variable(spank, "SLURM_STEP_NODELIST", "MASTER_ADDR", 1);
	snprintf(port, sizeof port, "%ld", number_of(spank, "SLURM_JOB_ID") % 4536 + 61000);
	set_variable(spank, "MASTER_PORT", port, 1);
	copy_variable(spank, "SLURM_NTASKS", "WORLD_SIZE", 1);
	copy_variable(spank, "SLURM_PROCID", "RANK", 2);
	copy_variable(spank, "SLURM_LOCALID", "LOCAL_RANK", 2);
	if (number_of(spank, "SLURM_STEP_NUM_TASKS") > number_of(spank, "SLURM_STEP_NUM_NODES") && !of_image("OMP_NUM_THREADS"))
		set_variable(spank, "OMP_NUM_THREADS", "1", 1);
}

static int write_map(const char *path, const char *text)
{
	int file = open(path, O_WRONLY | O_CLOEXEC);
	if (file < 0)
		return -1;
	int result = write(file, text, strlen(text)) < 0;
	close(file);
	return result;
}

/* The user is root within, and no other user outside. */
static int remap_root(void)
{
	char users[32], groups[32];
	snprintf(users, sizeof users, "0 %d 1", geteuid());
	snprintf(groups, sizeof groups, "0 %d 1", getegid());
	/* or else /proc/self is root's, as this process was */
	prctl(PR_SET_DUMPABLE, 1);
	return unshare(CLONE_NEWUSER) || write_map("/proc/self/setgroups", "deny") ||
	       write_map("/proc/self/uid_map", users) || write_map("/proc/self/gid_map", groups);
}

static int say_why(spank_t spank)
{
	int task = 0;
	spank_get_item(spank, S_TASK_ID, &task);
	if (task)
		return fails("container was not started successfully by another task", "");
	if (*enroot_log)
		slurm_error("pyxis: child %d failed with error code: 1", getpid());
	slurm_error("pyxis: %s", cause);
	if (strstr(cause, "source path"))
		slurm_error("pyxis: couldn't create enroot start configuration script");
	if (*enroot_log) {
		slurm_error("pyxis: printing enroot log file:");
		slurm_error("pyxis:     %s", enroot_log);
	}
	return -1;
}

int slurm_spank_task_init(spank_t spank, int argc, char **argv)
{
	static const char *const locale[] = { "LANG", "LANGUAGE", "LC_ALL" };
	const char *folder = value[WORKDIR] ? value[WORKDIR] : "/";
	(void) argc;
	(void) argv;
	if (!value[IMAGE] && !value[NAME])
		return 0;
	if (*cause)
		return say_why(spank);
	for (size_t i = 0; i < sizeof locale / sizeof *locale; i++)
		if (!is_named(locale[i]))
			spank_unsetenv(spank, locale[i]);
	set_variable(spank, "PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
	for (int i = 0; variables[i]; i++) {
		char *copy = strdup(variables[i]), *text = copy, *name = strsep(&text, "=");
		set_variable(spank, name, text, 1);
		free(copy);
	}
	if (of_image("PYTORCH_VERSION"))
		set_for_pytorch(spank);
	if (value[IMAGE])
		spank_setenv(spank, "PYXIS_STANDIN_IMAGE", value[IMAGE], 1);
	if ((value[REMAP] ? is_on(REMAP) : remaps_by_default) && geteuid() && remap_root())
		return fails("couldn't join user namespace: ", strerror(errno));
	if (chdir(folder)) {
		slurm_error("pyxis: couldn't chdir to %s: %s", folder, strerror(errno));
		return -1;
	}
	set_variable(spank, "PWD", folder, 1);
	return 0;
}
