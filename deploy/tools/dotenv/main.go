// Command dotenv writes deploy/.env for compose: the lines of .env.example, with
// a secret made for every variable that has no value there.
//
//	go run ./deploy/tools/dotenv > deploy/.env
package main

import (
	"bufio"
	"crypto/rand"
	"encoding/hex"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/crypto/bcrypt"
)

func main() {
	example := flag.String("example", "deploy/.env.example", "the file to fill in")
	flag.Parse()
	if err := run(*example, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "dotenv:", err)
		os.Exit(1)
	}
}

func run(example string, out io.Writer) error {
	f, err := os.Open(example)
	if err != nil {
		return err
	}
	err = fill(f, out)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// bcryptSuffix marks the hash of the variable named before it.
const bcryptSuffix = "_BCRYPT"

func fill(in io.Reader, out io.Writer) error {
	values := map[string]string{}
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		line := lines.Text()
		name, value, ok := strings.Cut(line, "=")
		if strings.HasPrefix(line, "#") || !ok {
			if _, err := fmt.Fprintln(out, line); err != nil {
				return err
			}
			continue
		}
		if value == "" {
			var err error
			if value, err = secret(name, values); err != nil {
				return err
			}
		}
		values[name] = value
		if _, err := fmt.Fprintf(out, "%s=%s\n", name, value); err != nil {
			return err
		}
	}
	return lines.Err()
}

// secret makes the value of a variable: hex, which is the same in URLs, YAML and
// configuration files; or the bcrypt hash of the variable it is named after.
func secret(name string, values map[string]string) (string, error) {
	if of, ok := strings.CutSuffix(name, bcryptSuffix); ok {
		plain, ok := values[of]
		if !ok {
			return "", fmt.Errorf("%s stands before %s, whose hash it is", name, of)
		}
		hash, err := bcrypt.GenerateFromPassword([]byte(plain), bcrypt.DefaultCost)
		if err != nil {
			return "", fmt.Errorf("%s: %w", name, err)
		}
		// Single quotes: compose would read the hash's '$' as variables.
		return "'" + string(hash) + "'", nil
	}
	var b [24]byte
	_, _ = rand.Read(b[:]) // never fails: it ends the process when the kernel has no randomness
	return hex.EncodeToString(b[:]), nil
}
