// Command protogen compiles schemas/proto with Go alone (no protoc, no plugin
// on the PATH) and writes schemas/gen. With -check it writes nothing and
// fails when the committed code is not what the schemas give.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"sort"

	"github.com/bufbuild/protocompile"
	"google.golang.org/protobuf/cmd/protoc-gen-go/internal_gengo"
	"google.golang.org/protobuf/compiler/protogen"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/pluginpb"
)

func main() {
	root := flag.String("schemas", "schemas", "the schemas module's folder")
	check := flag.Bool("check", false, "fail when the generated code is not current")
	flag.Parse()
	if err := run(*root, *check); err != nil {
		fmt.Fprintln(os.Stderr, "protogen:", err)
		os.Exit(1)
	}
}

func run(root string, check bool) error {
	protoDir := filepath.Join(root, "proto")
	var files []string
	err := filepath.WalkDir(protoDir, func(p string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(p) != ".proto" {
			return err
		}
		rel, err := filepath.Rel(protoDir, p)
		files = append(files, filepath.ToSlash(rel))
		return err
	})
	if err != nil {
		return err
	}
	sort.Strings(files)
	compiler := protocompile.Compiler{
		Resolver:       &protocompile.SourceResolver{ImportPaths: []string{protoDir}},
		SourceInfoMode: protocompile.SourceInfoStandard,
	}
	linked, err := compiler.Compile(context.Background(), files...)
	if err != nil {
		return err
	}
	req := &pluginpb.CodeGeneratorRequest{FileToGenerate: files, Parameter: proto.String("module=github.com/tollkeeper/tollkeeper/schemas")}
	// The plugin wants dependencies first; our files import only each other.
	seen := map[string]bool{}
	var add func(path string) error
	add = func(path string) error {
		if seen[path] {
			return nil
		}
		seen[path] = true
		fd := linked.FindFileByPath(path)
		if fd == nil {
			return fmt.Errorf("%s imports a file outside %s", path, protoDir)
		}
		for i := range fd.Imports().Len() {
			if err := add(fd.Imports().Get(i).Path()); err != nil {
				return err
			}
		}
		var p *descriptorpb.FileDescriptorProto = protodesc.ToFileDescriptorProto(fd)
		req.ProtoFile = append(req.ProtoFile, p)
		return nil
	}
	for _, f := range files {
		if err := add(f); err != nil {
			return err
		}
	}
	plugin, err := protogen.Options{}.New(req)
	if err != nil {
		return err
	}
	for _, f := range plugin.Files {
		if f.Generate {
			internal_gengo.GenerateFile(plugin, f)
		}
	}
	res := plugin.Response()
	if res.Error != nil {
		return fmt.Errorf("generate: %s", res.GetError())
	}
	for _, f := range res.File {
		path := filepath.Join(root, filepath.FromSlash(f.GetName()))
		if check {
			have, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if !bytes.Equal(have, []byte(f.GetContent())) {
				return fmt.Errorf("%s is not what schemas/proto gives: run `go tool task generate` and commit it", path)
			}
			continue
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(f.GetContent()), 0o644); err != nil {
			return err
		}
	}
	return nil
}
