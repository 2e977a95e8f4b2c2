package deploycheck

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// instructions returns the Dockerfile's, continued lines joined.
func instructions(t *testing.T) (all [][]string) {
	t.Helper()
	text := strings.ReplaceAll(string(read(t, "deploy/images/Dockerfile")), "\\\n", " ")
	for line := range strings.Lines(text) {
		if fields := strings.Fields(line); len(fields) > 0 && !strings.HasPrefix(fields[0], "#") {
			all = append(all, fields)
		}
	}
	return all
}

func TestDockerfileCopiesAndBuildsWhatExists(t *testing.T) {
	t.Parallel()
	ignored := strings.Fields(string(read(t, ".dockerignore")))
	stages := map[string]bool{}
	programs := map[string]bool{}
	for _, in := range instructions(t) {
		switch in[0] {
		case "FROM":
			if i := slices.Index(in, "AS"); i > 0 {
				stages[in[i+1]] = true
			}
		case "COPY":
			from := ""
			args := slices.DeleteFunc(slices.Clone(in[1:]), func(a string) bool {
				if stage, ok := strings.CutPrefix(a, "--from="); ok {
					from = stage
				}
				return strings.HasPrefix(a, "--")
			})
			for _, src := range args[:len(args)-1] {
				switch {
				case from != "":
					if !stages[from] {
						t.Errorf("COPY from stage %s, which comes later or never", from)
					}
				case slices.Contains(ignored, src):
					t.Errorf("COPY %s, which .dockerignore leaves out", src)
				default:
					if _, err := os.Stat(filepath.Join(root, src)); err != nil {
						t.Errorf("COPY %s: %v", src, err)
					}
				}
			}
		case "RUN":
			dir := ""
			for i, word := range in {
				switch {
				case word == "cd":
					dir = filepath.Join(dir, in[i+1])
				case strings.HasPrefix(word, "./"):
					files, err := filepath.Glob(filepath.Join(root, dir, word, "*.go"))
					if err != nil || len(files) == 0 {
						t.Errorf("%s/%s is no program (%v)", dir, word, err)
					}
					programs[filepath.Base(word)] = true
				}
			}
		}
	}
	if len(programs) < 7 {
		t.Errorf("only %v are built", programs)
	}
	for name, s := range project(t).Services {
		words := slices.Clone(s.Entrypoint)
		if s.HealthCheck != nil {
			words = append(words, s.HealthCheck.Test...)
		}
		for _, w := range words {
			if p, ok := strings.CutPrefix(w, "/usr/local/bin/"); ok && !programs[p] {
				t.Errorf("%s runs %s, which the image does not have", name, p)
			}
		}
	}
}

func TestImageRunsAsNobodySpecialOnGlibc(t *testing.T) {
	t.Parallel()
	text := string(read(t, "deploy/images/Dockerfile"))
	if !regexp.MustCompile(`(?m)^USER 65532:65532$`).MatchString(text) {
		t.Error("the image runs as root")
	}
	if !regexp.MustCompile(`(?m)^ARG BASE_IMAGE=.*(distroless/(base|cc)|debian|ubuntu)`).MatchString(text) {
		t.Error("the base has no glibc, which the embedded engine needs")
	}
	ignored := strings.Fields(string(read(t, ".dockerignore")))
	for _, secret := range []string{"deploy/.env", ".git", ".tollkeeper"} {
		if !slices.Contains(ignored, secret) {
			t.Errorf(".dockerignore lets %s into the image's build", secret)
		}
	}
	if !strings.Contains(string(read(t, "deploy/.gitignore")), "/.env") {
		t.Error("deploy/.env could be committed")
	}
}
