package main

import (
	"context"
	"encoding/json"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/uuid"
	"k8s.io/klog/v2"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
)

const (
	// A pod that says one of these ends by itself: "2.5", or "2s" as KWOK's stages have it.
	secondsAnnotation = "tangram.test/seconds"
	finishAnnotation  = "tangram.test/finish-after"

	retryEvery = 500 * time.Millisecond

	exitedWell   = 0
	exitedOnTERM = 143
)

// life is an admitted pod from its first container to its removal from the API.
type life struct {
	k      *kubelet
	pod    *v1.Pod
	ending context.Context // done when the pod is to end
}

// begin starts the pod's life in a goroutine of its own; the function that it returns asks it to end.
func (k *kubelet) begin(ctx context.Context, pod *v1.Pod) context.CancelFunc {
	ending, end := context.WithCancel(ctx)
	go (&life{k, pod, ending}).run(ctx)
	return end
}

// run returns early when the kubelet itself ends: containers outlive it.
func (l *life) run(ctx context.Context) {
	if l.startContainers(ctx) {
		l.k.tell(ctx, l.pod, runningStatus(l.pod, l.started()))
		l.wait()
	}
	if ctx.Err() != nil {
		return
	}
	code, reason := exitedWell, "finished"
	if l.ending.Err() != nil {
		code, reason = exitedOnTERM, "deleted"
	}
	started := l.started()
	if !l.k.endContainers(ctx, l.pod.UID, reason) {
		return
	}
	l.k.pods.markOver(l.pod.UID)
	l.k.tell(ctx, l.pod, endedStatus(l.pod, started, code))
	if newest, known := l.k.pods.byUID(l.pod.UID); known && newest.DeletionTimestamp != nil {
		l.k.deletePod(ctx, newest)
	}
}

// startContainers returns false if the pod is to end before all have started. Those that run already, since before
// this kubelet was started, are left alone.
func (l *life) startContainers(ctx context.Context) bool {
	running := map[string]bool{}
	for _, event := range l.k.containers.of(string(l.pod.UID)) {
		running[event.Container] = true
	}
	if len(running) == 0 && !l.runInitContainers(ctx) {
		return false
	}
	for index := range l.pod.Spec.Containers {
		container := &l.pod.Spec.Containers[index]
		if running[container.Name] {
			continue
		}
		if _, started := l.start(ctx, container); !started {
			return false
		}
	}
	return true
}

func (l *life) runInitContainers(ctx context.Context) bool {
	for index := range l.pod.Spec.InitContainers {
		container := &l.pod.Spec.InitContainers[index]
		id, started := l.start(ctx, container)
		if !started {
			return false
		}
		if !podutil.IsRestartableInitContainer(container) {
			l.k.endContainer(ctx, id, "finished")
		}
	}
	return true
}

// start asks for the container's devices until it gets them, as a kubelet tries again and again to make a container.
func (l *life) start(ctx context.Context, container *v1.Container) (string, bool) {
	for l.ending.Err() == nil {
		options, err := l.k.devices.GetDeviceRunContainerOptions(ctx, l.pod, container)
		if err == nil {
			event := containerEvent{
				Event: containerStarted, UID: string(l.pod.UID), Namespace: l.pod.Namespace, Pod: l.pod.Name,
				Container: container.Name, ID: string(uuid.NewUUID()),
			}
			event.given(l.k.devices.GetDevices(event.UID, container.Name), options)
			l.k.topology.AddContainer(klog.FromContext(ctx), l.pod, container, event.ID)
			l.k.write(event)
			return event.ID, true
		}
		klog.ErrorS(err, "Cannot start a container", "pod", klog.KObj(l.pod), "container", container.Name)
		sleep(l.ending, retryEvery)
	}
	return "", false
}

// wait returns when the pod has run its time, or is to end before.
func (l *life) wait() {
	runs, ends := lifetime(l.pod)
	if !ends {
		<-l.ending.Done()
		return
	}
	sleep(l.ending, runs-time.Since(l.started()))
}

func lifetime(pod *v1.Pod) (time.Duration, bool) {
	said := pod.Annotations[finishAnnotation]
	if seconds, says := pod.Annotations[secondsAnnotation]; says {
		said = seconds + "s"
	}
	runs, err := time.ParseDuration(said)
	return runs, err == nil
}

// started is when the first of the containers that run now did.
func (l *life) started() time.Time {
	first := time.Now()
	for _, event := range l.k.containers.of(string(l.pod.UID)) {
		if at, err := time.Parse(time.RFC3339Nano, event.Time); err == nil && at.Before(first) {
			first = at
		}
	}
	return first
}

// endContainers takes its time, unless nothing runs; false if the kubelet ended before.
func (k *kubelet) endContainers(ctx context.Context, uid types.UID, reason string) bool {
	running := k.containers.of(string(uid))
	if len(running) == 0 {
		return ctx.Err() == nil
	}
	sleep(ctx, k.chance.within(k.options.endWithin))
	if ctx.Err() != nil {
		return false
	}
	for _, event := range running {
		k.endContainer(ctx, event.ID, reason)
	}
	return true
}

func (k *kubelet) endContainer(ctx context.Context, id, reason string) {
	if err := k.containers.end(id, reason); err != nil {
		klog.ErrorS(err, "Cannot write what containers do")
		klog.FlushAndExit(klog.ExitFlushTimeout, 1)
	}
	_ = k.topology.RemoveContainer(klog.FromContext(ctx), id)
}

// tell patches the pod's status until the API server has taken it or the pod has gone.
func (k *kubelet) tell(ctx context.Context, pod *v1.Pod, status v1.PodStatus) {
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"uid": pod.UID}, "status": whole(status)})
	if err != nil {
		panic(err)
	}
	k.insist(ctx, pod, "tell a status", func() error {
		_, err := k.client.CoreV1().Pods(pod.Namespace).Patch(
			ctx, pod.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
		return err
	})
}

// whole has null for what the status no longer says, so that a patch takes it away, as upstream's patch of the
// difference does: of a pod that ran before and is refused after a restart no container is said to run.
func whole(status v1.PodStatus) map[string]any {
	text, err := json.Marshal(status)
	if err != nil {
		panic(err)
	}
	said := map[string]any{"containerStatuses": nil, "initContainerStatuses": nil, "reason": nil, "message": nil}
	if err := json.Unmarshal(text, &said); err != nil {
		panic(err)
	}
	return said
}

// deletePod takes a pod that has ended out of the API.
func (k *kubelet) deletePod(ctx context.Context, pod *v1.Pod) {
	options := metav1.NewDeleteOptions(0)
	options.Preconditions = metav1.NewUIDPreconditions(string(pod.UID))
	k.insist(ctx, pod, "delete", func() error {
		return k.client.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, *options)
	})
}

func (k *kubelet) insist(ctx context.Context, pod *v1.Pod, what string, call func() error) {
	for ctx.Err() == nil {
		err := call()
		if err == nil || apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
			return // with our uid a conflict means that the name is another pod's now
		}
		klog.ErrorS(err, "Will try again", "to", what, "pod", klog.KObj(pod))
		if apierrors.IsInvalid(err) {
			return
		}
		sleep(ctx, retryEvery)
	}
}

func sleep(ctx context.Context, duration time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(duration):
	}
}
